//! QEMU's monitor: <https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html>.

use crate::{PATIENCE, eventually};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to a running QEMU, which takes one at a time.
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects; waits for the socket of a QEMU that is still coming up. It answers when all devices are there.
    pub fn connect(socket: &Path) -> Self {
        let connect = || UnixStream::connect(socket).ok();
        let stream = eventually(&format!("{}", socket.display()), PATIENCE, connect);
        let limited = stream.set_read_timeout(Some(2 * PATIENCE));
        limited.unwrap_or_else(|e| panic!("{}: {e}", socket.display()));
        let mut this = Self(BufReader::new(stream));
        let greeted = this.message();
        greeted.unwrap_or_else(|e| panic!("QEMU does not greet at {}: {e}", socket.display()));
        this.execute("qmp_capabilities", &json!({}));
        this
    }

    /// What a command returned, or why it was refused.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn try_execute(
        &mut self,
        command: &str,
        arguments: &Value,
    ) -> io::Result<Result<Value, String>> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.0.get_mut().write_all(line.as_bytes())?;
        loop {
            // Events come in between.
            let mut message = self.message()?;
            if let Some(value) = message.get_mut("return") {
                return Ok(Ok(value.take()));
            }
            if let Some(error) = message.get("error") {
                return Ok(Err(error["desc"].as_str().unwrap_or("no reason given").to_owned()));
            }
        }
    }

    /// As [`Qmp::try_execute`]; must succeed.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        match self.try_execute(command, arguments) {
            Ok(Ok(value)) => value,
            Ok(Err(reason)) => panic!("QEMU refused {command} {arguments}: {reason}"),
            Err(e) => panic!("QEMU is gone at {command} {arguments}: {e}"),
        }
    }

    fn message(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }
}

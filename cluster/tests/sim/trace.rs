//! What happened, in lines for people.

/// The lines of a run, if anybody wants them.
#[derive(Default)]
pub struct Trace {
    pub on: bool,
    /// Printed at once instead of kept.
    pub live: bool,
    pub lines: Vec<String>,
}

impl Trace {
    pub fn add(&mut self, now: u64, line: &str) {
        let line = format!("t={now} {line}");
        if self.live {
            println!("{line}");
        } else {
            self.lines.push(line);
        }
    }
}

/// Notes a line; its text is not even made when nobody wants it.
macro_rules! note {
    ($world:expr, $($text:tt)*) => {
        if $world.trace.on {
            let line = format!($($text)*);
            let now = $world.now;
            $world.trace.add(now, &line);
        }
    };
}

//! What to give a client of a new export, ready to copy into a shell.

use sheepdog::api::{ExportInfo, Protocol};
use std::net::SocketAddr;

/// How clients reach the export, over several lines.
pub fn hint(export: &ExportInfo) -> String {
    match export.protocol {
        Protocol::Nbd => nbd(export),
        Protocol::VhostUser => vhost_user(&export.address),
    }
}

fn nbd(export: &ExportInfo) -> String {
    let name = uri(&export.volume, "");
    match export.address.parse::<SocketAddr>() {
        Ok(address) => {
            let which = if address.ip().is_unspecified() {
                format!("\n{} stands for every address of the node: use one of them.", address.ip())
            } else {
                String::new()
            };
            format!("NBD URI:\n  nbd://{address}/{name}{which}\n")
        }
        // The URI is quoted for the shell because of its `?`.
        Err(_) => {
            let path = uri(&export.address, "/");
            format!(
                "NBD URI, on the host of the node:\n  {}\n",
                shell(&format!("nbd+unix:///{name}?socket={path}"))
            )
        }
    }
}

fn vhost_user(path: &str) -> String {
    // In QEMU's option lists a comma in a value is written twice.
    let path = path.replace(',', ",,");
    let chardev = shell(&format!("socket,id=c0,path={path},reconnect=1"));
    format!(
        "QEMU arguments, on the host of the node:\n  \
         -chardev {chardev} -device vhost-user-blk-pci,chardev=c0\n\
         The guest's memory must be shared, once for all its devices; SIZE is that of -m:\n  \
         -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine q35,memory-backend=mem\n\
         reconnect=1 lets the guest outlive restarts of sheep; newer QEMU (9.2 on) calls it \
         reconnect-ms=1000.\n"
    )
}

/// Percent-encodes `text` (RFC 3986, section 2.1) but for unreserved characters and `also`.
fn uri(text: &str, also: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        let plain = char::from(byte);
        if byte.is_ascii_alphanumeric() || "-._~".contains(plain) || also.contains(plain) {
            encoded.push(plain);
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Quotes `word` for a POSIX shell if it needs it.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~/:=,+%@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(volume: &str, protocol: Protocol, address: &str) -> ExportInfo {
        ExportInfo {
            volume: volume.into(),
            protocol,
            address: address.into(),
            clients: 0,
            state: "serving".into(),
        }
    }

    #[test]
    fn nbd_uris() {
        let line = |volume, address| {
            let text = hint(&export(volume, Protocol::Nbd, address));
            text.lines().nth(1).unwrap().trim().to_string()
        };
        assert_eq!(line("vm1", "/run/vm1.sock"), "'nbd+unix:///vm1?socket=/run/vm1.sock'");
        assert_eq!(line("vm1", "127.0.0.1:10809"), "nbd://127.0.0.1:10809/vm1");
        assert_eq!(line("a b/c", "[::1]:1"), "nbd://[::1]:1/a%20b%2Fc");
        assert_eq!(line("v", "/a b?&é"), "'nbd+unix:///v?socket=/a%20b%3F%26%C3%A9'");
    }

    #[test]
    fn addresses_that_nobody_can_connect_to_are_explained() {
        let text = |address| hint(&export("v", Protocol::Nbd, address));
        assert!(text("0.0.0.0:10809").contains("every address of the node"));
        assert!(!text("127.0.0.1:10809").contains("every address"));
    }

    #[test]
    fn qemu_arguments() {
        let text = hint(&export("v", Protocol::VhostUser, "/run/v.sock"));
        assert!(text.contains(
            "-chardev socket,id=c0,path=/run/v.sock,reconnect=1 \
             -device vhost-user-blk-pci,chardev=c0\n"
        ));
        assert!(text.contains("-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine"));
        let text = hint(&export("v", Protocol::VhostUser, "/a b,c'd"));
        assert!(text.contains(r"-chardev 'socket,id=c0,path=/a b,,c'\''d,reconnect=1' "), "{text}");
    }
}

//! Where an export listens, as the user names it and as the node is told.

use std::net::SocketAddr;
use std::path::{Path, absolute};

/// `IP:PORT` of a TCP socket, or the path of a Unix socket made absolute against the current
/// directory, since the node's is another.
///
/// # Errors
/// It is neither; the text says what would be right.
pub fn parse_nbd(text: &str) -> Result<String, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address.to_string());
    }
    if text.contains(':') && !text.contains('/') {
        return Err(format!(
            "it is no IP:PORT like 127.0.0.1:10809 or [::1]:10809 (host names are not looked up); \
             if it is a file, write ./{text}"
        ));
    }
    absolute_path(text)
}

/// The path of a Unix socket, made absolute like that of [`parse_nbd`].
///
/// # Errors
/// It is an `IP:PORT` or no path; the text says what would be right.
pub fn parse_vhost_user(text: &str) -> Result<String, String> {
    if text.contains(':') && !text.contains('/') {
        return Err(format!(
            "vhost-user shares memory, so it needs the path of a Unix socket; if it is a file, \
             write ./{text}"
        ));
    }
    absolute_path(text)
}

/// The path of a directory, made absolute like that of [`parse_nbd`].
///
/// # Errors
/// It is no path; the text says what would be right.
pub fn parse_directory(text: &str) -> Result<String, String> {
    let trimmed = text.trim_end_matches('/');
    if trimmed.is_empty() {
        return Err("it does not name a directory; write a path like /mnt/nvme1".into());
    }
    made_absolute(trimmed)
}

fn absolute_path(text: &str) -> Result<String, String> {
    if text.is_empty() || text.ends_with('/') {
        return Err("it does not name a socket; write a path like /run/sheepdog/vm1.sock".into());
    }
    made_absolute(text)
}

fn made_absolute(text: &str) -> Result<String, String> {
    absolute(Path::new(text))
        .map_err(|error| format!("cannot find the current directory: {error}"))?
        .into_os_string()
        .into_string()
        .map_err(|_| "the current directory is not named in UTF-8; write an absolute path".into())
}

/// The address of a node.
///
/// # Errors
/// It is no `IP:PORT`; the text says what would be right.
pub fn parse_node(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        "write IP:PORT like 127.0.0.1:7000 or [::1]:7000; host names are not looked up".into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_told_from_paths() {
        for text in ["127.0.0.1:10809", "[::1]:10809", "0.0.0.0:0"] {
            assert_eq!(parse_nbd(text), Ok(text.to_string()));
            assert!(parse_vhost_user(text).unwrap_err().contains("Unix socket"));
        }
        for text in ["/run/vm1.sock", "/run/10.0.0.1:7000", "/run/a:b"] {
            assert_eq!(parse_nbd(text), Ok(text.to_string()));
            assert_eq!(parse_vhost_user(text), Ok(text.to_string()));
        }
        for text in ["localhost:10809", "127.0.0.1:", "1.2.3.4:99999", "a:b", ":1"] {
            assert!(parse_nbd(text).unwrap_err().contains("IP:PORT"), "{text}");
            assert!(parse_vhost_user(text).is_err(), "{text}");
        }
        for text in ["", "/", "dir/"] {
            assert!(parse_nbd(text).unwrap_err().contains("socket"), "{text}");
            assert!(parse_vhost_user(text).is_err(), "{text}");
        }
    }

    #[test]
    fn relative_paths_become_absolute() {
        let here = std::env::current_dir().unwrap();
        let here = here.to_str().unwrap();
        assert_eq!(parse_nbd("vm1.sock"), Ok(format!("{here}/vm1.sock")));
        assert_eq!(parse_nbd("./a:b"), Ok(format!("{here}/a:b")));
        assert_eq!(parse_vhost_user("run/vm1.sock"), Ok(format!("{here}/run/vm1.sock")));
        // `..` stays: what it means after a symbolic link only the file system knows.
        assert_eq!(parse_nbd("../x"), Ok(format!("{here}/../x")));
    }

    #[test]
    fn directories_become_absolute() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(parse_directory("/mnt/a/"), Ok("/mnt/a".into()));
        assert_eq!(parse_directory("a"), Ok(here.join("a").display().to_string()));
        for text in ["", "/", "//"] {
            assert!(parse_directory(text).unwrap_err().contains("directory"), "{text}");
        }
    }

    #[test]
    fn nodes_are_socket_addresses() {
        assert_eq!(parse_node("127.0.0.1:7000"), Ok(SocketAddr::from(([127, 0, 0, 1], 7000))));
        for text in ["", "127.0.0.1", "node1:7000", "[::1]", "127.0.0.1:70000"] {
            assert!(parse_node(text).unwrap_err().contains("IP:PORT"), "{text}");
        }
    }
}

//! The protocol as plain state machines: bytes in, events and bytes out. No sockets, no threads,
//! no clocks. One file per phase:
//!
//! ```text
//!  handshake::Handshake ──(EXPORT_NAME, GO)──► transmission::Transmission ──(DISC, EOF)──► closed
//!      options::*                                   reply::Reply
//! ```

pub mod handshake;
pub mod input;
pub mod options;
pub mod reply;
pub mod transmission;
pub mod wire;

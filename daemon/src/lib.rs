//! The shell around the cluster core: sockets, threads, the cluster log driver, exports and the
//! administration interface. The binaries `sheep` and `dog` are thin covers of this library.

#![forbid(unsafe_code)]

pub mod api;
pub mod wire;

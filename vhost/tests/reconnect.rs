//! Alone in its process, so that it can count open descriptors.
#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use std::fs;

use support::guest::{Guest, Setup, driver};

#[test]
fn a_new_client_finds_the_old_ones_data_and_no_descriptor_is_lost() {
    let setup = Setup::new();
    let server = setup.start();
    let mut open = Vec::new();
    for round in 0..6 {
        let guest = Guest::connect(&setup.path(), 0);
        let mut driver = driver(&guest);
        assert_eq!(server.clients(), 1);
        if round > 0 {
            assert_eq!(guest.read(&mut driver, 9, false), round);
        }
        guest.write(&mut driver, 9, round + 1, false);
        // A client is served only after all that belonged to the one before is gone.
        open.push(fs::read_dir("/proc/self/fd").unwrap().count());
    }
    assert!(open.iter().all(|&count| count == open[0]), "open descriptors: {open:?}");
    drop(server);
}

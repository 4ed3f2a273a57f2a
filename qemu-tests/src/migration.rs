//! Live migration of a guest from one QEMU to another.

use crate::guest::Qemu;
use crate::{Disk, Guest, Lab, PATIENCE, eventually};
use serde_json::{Value, json};
use std::process::ExitStatus;
use std::time::Duration;

/// A QEMU that waits for a guest. Dropping it kills it.
pub struct Target {
    qemu: Qemu,
    address: String,
}

impl Target {
    /// SIGKILL.
    pub fn kill(mut self) {
        self.qemu.process.kill();
    }

    /// Waits until it gives up by itself; returns how, and what a guest has printed there.
    pub fn wait_end(mut self) -> (ExitStatus, String) {
        let status = self.qemu.process.wait(PATIENCE);
        (status, self.qemu.read_to_end())
    }

    fn run_state(&mut self) -> Value {
        self.qemu.qmp().execute("query-status", &json!({}))["status"].take()
    }
}

/// How a guest's memory is sent.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Bytes a second.
    pub bandwidth: u64,
    /// How long the guest may stand still.
    pub downtime: Duration,
}

impl Pace {
    /// A fast network, and a stop that a user will hardly notice.
    pub const USUAL: Self = Self { bandwidth: 1 << 30, downtime: Duration::from_millis(20) };
    /// A stop so short that a guest which keeps writing to some MiB of its memory does not get away.
    pub const FIRST: Self = Self { bandwidth: 128 << 20, downtime: Duration::from_millis(1) };
    /// The same for whatever a guest does.
    const NEVER: Self = Self { bandwidth: 4 << 20, ..Self::FIRST };
    /// Now.
    pub const END: Self = Self { bandwidth: 1 << 30, downtime: Duration::from_secs(1) };
}

impl Guest {
    /// Starts a QEMU to which this guest can move; `disk` is how it reaches the same volume from there.
    pub fn target(&self, lab: &Lab, name: &str, disk: &Disk) -> Target {
        let address = format!("unix:{}", lab.path(&format!("{name}.in")).display());
        let qemu = self.start_incoming(lab, name, disk, &address);
        let mut target = Target { qemu, address };
        assert_eq!(target.run_state(), "inmigrate", "{name} does not wait for a guest");
        target
    }

    /// Begins to send the guest, which goes on running.
    pub fn begin_move(&mut self, target: &Target, pace: Pace) {
        self.set_pace(pace);
        self.qemu.qmp().execute("migrate", &json!({"uri": target.address}));
    }

    /// Another pace, also for a migration that is under way.
    pub fn set_pace(&mut self, pace: Pace) {
        let parameters = json!({
            "max-bandwidth": pace.bandwidth,
            "downtime-limit": pace.downtime.as_millis() as u64,
        });
        self.qemu.qmp().execute("migrate-set-parameters", &parameters);
    }

    /// Waits until all memory was sent once, and what changed meanwhile is being sent: whatever a disk's server
    /// writes into memory from now on is lost if it does not log it. It does not end before [`Guest::set_pace`] if it
    /// began with [`Pace::FIRST`].
    pub fn wait_sent_once(&mut self) {
        self.wait_migration("to send all memory once", |migration| {
            let status = &migration["status"];
            assert!(status == "setup" || status == "active", "it ended early: {migration}");
            // QEMU looks which pages were written before the first round and after it.
            migration["ram"]["dirty-sync-count"].as_u64() >= Some(2)
        });
        self.set_pace(Pace::NEVER);
    }

    /// Gives a migration up; the guest stays where it is.
    pub fn cancel_move(&mut self) {
        self.qemu.qmp().execute("migrate_cancel", &json!({}));
        self.wait_migration("to be cancelled", |migration| migration["status"] == "cancelled");
    }

    /// Waits until a migration has failed; the guest stays where it is.
    pub fn wait_move_failed(&mut self) {
        self.wait_migration("to fail", |migration| migration["status"] == "failed");
    }

    /// Waits until the guest runs in the other QEMU and ends the one it was in. Returns what the old one says of
    /// the migration.
    pub fn finish_move(&mut self, mut target: Target) -> Value {
        let migration = self.wait_migration("to complete", |migration| {
            let status = &migration["status"];
            assert!(status != "failed" && status != "cancelled", "{migration}");
            status == "completed"
        });
        eventually("the guest to run in the other QEMU", PATIENCE, || {
            (target.run_state() == "running").then_some(())
        });
        self.leave_for(target.qemu);
        migration
    }

    fn wait_migration(&mut self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        eventually(&format!("the migration {what}"), 2 * PATIENCE, || {
            let migration = self.qemu.qmp().execute("query-migrate", &json!({}));
            is_so(&migration).then_some(migration)
        })
    }
}

//! Epochs that were: enough of the past to tell who may hold the newest data of a slot.

use serde::{Deserialize, Serialize};
use sheepdog_types::{DiskId, Epoch};

/// Most epochs remembered (I10). A disk that was away for longer is never an authority.
pub const MAX_HISTORY: usize = 1024;

/// How a committed membership differs from the one before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Its number.
    pub epoch: Epoch,
    /// Disks that were not up in the epoch before.
    pub came_up: Vec<DiskId>,
    /// Disks that were up in the epoch before.
    pub went_down: Vec<DiskId>,
    /// What happened, for people.
    pub cause: String,
    /// Wall clock of the proposer, seconds since 1970, for people.
    pub at: u64,
}

/// What one disk of a slot brings to the question who has the newest data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The disk.
    pub disk: DiskId,
    /// It is up now.
    pub up: bool,
    /// First epoch whose writes it may lack; `None` when it lacks none.
    pub missed_since: Option<Epoch>,
}

impl Standing {
    /// Whether it holds all durable writes of `epoch`, provided it was up then.
    #[must_use]
    pub fn covers(&self, epoch: Epoch) -> bool {
        self.missed_since.is_none_or(|missed| missed > epoch)
    }
}

/// The last epoch in which a slot may have taken writes.
///
/// A slot takes writes only while at least `min_copies` of its disks are up and one of them holds
/// everything older. Walks back from the present; `None` when there was no such epoch in a history
/// that reaches back to the first one, so that no data can exist.
///
/// # Errors
/// [`Forgotten`] when the history was cut before an answer was found.
pub fn last_active(
    records: &[EpochRecord],
    slot: &[Standing],
    min_copies: usize,
) -> Result<Option<Epoch>, Forgotten> {
    let mut up: Vec<bool> = slot.iter().map(|s| s.up).collect();
    for record in records.iter().rev() {
        let count = up.iter().filter(|&&u| u).count();
        let covered = slot.iter().zip(&up).any(|(s, &u)| u && s.covers(record.epoch));
        if count >= min_copies && covered {
            return Ok(Some(record.epoch));
        }
        for (standing, up) in slot.iter().zip(&mut up) {
            if record.came_up.contains(&standing.disk) {
                *up = false;
            } else if record.went_down.contains(&standing.disk) {
                *up = true;
            }
        }
    }
    match records.first() {
        Some(first) if first.epoch > Epoch(1) => Err(Forgotten),
        _ => Ok(None),
    }
}

/// The history does not reach back far enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forgotten;

#[cfg(test)]
mod tests {
    use super::*;

    const A: DiskId = DiskId(1);
    const B: DiskId = DiskId(2);
    const C: DiskId = DiskId(3);

    fn record(epoch: u64, came_up: &[DiskId], went_down: &[DiskId]) -> EpochRecord {
        EpochRecord {
            epoch: Epoch(epoch),
            came_up: came_up.to_vec(),
            went_down: went_down.to_vec(),
            cause: String::new(),
            at: 0,
        }
    }

    fn standing(disk: DiskId, up: bool, missed: Option<u64>) -> Standing {
        Standing { disk, up, missed_since: missed.map(Epoch) }
    }

    #[test]
    fn the_present_counts_while_a_complete_disk_is_up() {
        let history = [record(1, &[A, B, C], &[]), record(2, &[], &[C])];
        let slot = [standing(A, true, None), standing(B, true, None), standing(C, false, Some(2))];
        assert_eq!(last_active(&history, &slot, 2), Ok(Some(Epoch(2))));
    }

    #[test]
    fn a_lonely_survivor_does_not_make_the_others_stale() {
        // B went in 2, A went in 3: with min_copies 2, nothing was written in 3.
        let history = [record(1, &[A, B, C], &[]), record(2, &[], &[B]), record(3, &[], &[A])];
        let slot =
            [standing(A, false, Some(3)), standing(B, false, Some(2)), standing(C, true, None)];
        assert_eq!(last_active(&history, &slot, 2), Ok(Some(Epoch(2))));
        assert_eq!(last_active(&history, &slot, 1), Ok(Some(Epoch(3))));
    }

    #[test]
    fn epochs_without_a_complete_disk_do_not_count() {
        // A left in 2, B wrote alone in 2 and left in 3, A came back in 4: 4 took no writes.
        let history = [
            record(1, &[A, B], &[]),
            record(2, &[], &[A]),
            record(3, &[], &[B]),
            record(4, &[A], &[]),
        ];
        let slot = [standing(A, true, Some(2)), standing(B, false, Some(3))];
        assert_eq!(last_active(&history, &slot, 1), Ok(Some(Epoch(2))));
        assert!(!slot[0].covers(Epoch(2)), "A must wait for B");
        assert!(slot[1].covers(Epoch(2)));
    }

    #[test]
    fn a_cut_history_is_admitted() {
        let slot = [standing(A, true, Some(2))];
        assert_eq!(last_active(&[record(9, &[A], &[])], &slot, 1), Err(Forgotten));
        assert_eq!(last_active(&[record(1, &[A], &[])], &[], 1), Ok(None));
    }
}

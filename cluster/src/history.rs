//! Epochs that were: enough of the past to tell who may hold the newest data of a slot.

use serde::{Deserialize, Serialize};
use sheepdog_types::{DiskId, Epoch};

/// Most epochs remembered (I10). A disk that was away for longer is never an authority.
pub const MAX_HISTORY: usize = 1024;

/// How a committed membership differs from the one before it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Its number.
    pub epoch: Epoch,
    /// Disks that were not up in the epoch before.
    pub came_up: Vec<DiskId>,
    /// Disks that were up in the epoch before.
    pub went_down: Vec<DiskId>,
    /// Disks that were not out in the epoch before.
    pub went_out: Vec<DiskId>,
    /// Disks that were out in the epoch before.
    pub came_in: Vec<DiskId>,
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
    /// It is out now: others take its place.
    pub out: bool,
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

/// How many disks of a slot's home have to be up for I/O, given how many are not out: `min_copies`
/// of them, as far as there are so many. Those that took the place of a disk that is out make up
/// for the rest.
#[must_use]
pub fn needed_at_home(min_copies: usize, in_place: usize) -> usize {
    min_copies.min(in_place).max(1)
}

/// The last epoch in which a slot may have taken writes.
///
/// A slot takes writes only while enough of its disks are up ([`needed_at_home`]) and one of them
/// holds everything older. Walks back from the present; `None` when there was no such epoch in a history
/// that reaches back to the first one, so that no data can exist.
///
/// # Errors
/// [`Forgotten`] when the history was cut before an answer was found.
pub fn last_active(
    records: &[EpochRecord],
    slot: &[Standing],
    min_copies: usize,
) -> Result<Option<Epoch>, Forgotten> {
    let mut now: Vec<Standing> = slot.to_vec();
    for record in records.iter().rev() {
        let up = now.iter().filter(|s| s.up).count();
        let needed = needed_at_home(min_copies, now.iter().filter(|s| !s.out).count());
        if up >= needed && now.iter().any(|s| s.up && s.covers(record.epoch)) {
            return Ok(Some(record.epoch));
        }
        for standing in &mut now {
            let is = |list: &[DiskId]| list.contains(&standing.disk);
            standing.up = (standing.up && !is(&record.came_up)) || is(&record.went_down);
            standing.out = (standing.out && !is(&record.went_out)) || is(&record.came_in);
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
            ..EpochRecord::default()
        }
    }

    fn standing(disk: DiskId, up: bool, missed: Option<u64>) -> Standing {
        Standing { disk, up, out: false, missed_since: missed.map(Epoch) }
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
    fn a_survivor_of_disks_that_are_out_takes_writes_with_those_in_their_place() {
        // B and C went in 2 and were given up as home in 3, so A and newcomers took writes from then on.
        let mut history =
            [record(1, &[A, B, C], &[]), record(2, &[], &[B, C]), record(3, &[], &[])];
        history[2].went_out = vec![B, C];
        let gone = |disk| Standing { out: true, ..standing(disk, false, Some(2)) };
        let slot = [standing(A, false, Some(4)), gone(B), gone(C)];
        let died = |history: &[EpochRecord]| {
            let mut all = history.to_vec();
            all.push(record(4, &[], &[A]));
            all
        };
        assert_eq!(last_active(&died(&history), &slot, 2), Ok(Some(Epoch(3))));
        // They come back: still only A has what was written meanwhile.
        let mut all = died(&history);
        all.push(EpochRecord { came_in: vec![B, C], ..record(5, &[B, C], &[]) });
        let slot =
            [standing(A, false, Some(4)), standing(B, true, Some(2)), standing(C, true, Some(2))];
        assert_eq!(last_active(&all, &slot, 2), Ok(Some(Epoch(3))));
        assert!(slot[0].covers(Epoch(3)) && !slot[1].covers(Epoch(3)));
        // Had they not been out, A alone would have taken none.
        history[2].went_out.clear();
        let mut all = died(&history);
        all.push(record(5, &[B, C], &[]));
        assert_eq!(last_active(&all, &slot, 2), Ok(Some(Epoch(1))));
    }

    #[test]
    fn a_cut_history_is_admitted() {
        let slot = [standing(A, true, Some(2))];
        assert_eq!(last_active(&[record(9, &[A], &[])], &slot, 1), Err(Forgotten));
        assert_eq!(last_active(&[record(1, &[A], &[])], &[], 1), Ok(None));
    }
}

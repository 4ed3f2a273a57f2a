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

/// How many disks of a slot's home have to be up for I/O, given how many are not out: `min_copies`
/// of them, as far as there are so many. Those that took the place of a disk that is out make up
/// for the rest.
#[must_use]
pub fn needed_at_home(min_copies: usize, in_place: usize) -> usize {
    min_copies.min(in_place).max(1)
}

/// The disks of a slot that hold everything that was durable in it; those of them that are up say
/// what is newest. Empty when no disk can, so that there is nothing to wait for.
///
/// A slot takes writes only while enough of its disks are up ([`needed_at_home`]) and one of them
/// holds everything older. Whoever is not up in such an epoch lacks its writes from then on. So a
/// disk that was away may still hold everything: if nothing was written without it. It is then the
/// one that lets the slot take writes, and from that moment on the others that were away do not.
///
/// # Errors
/// [`Forgotten`] when the history was cut before an answer was found.
pub fn holders(
    records: &[EpochRecord],
    slot: &[Standing],
    min_copies: usize,
) -> Result<Vec<DiskId>, Forgotten> {
    let known = records.first().map_or(Epoch(1), |record| record.epoch);
    let whole = known <= Epoch(1);
    let missed = |s: &Standing| s.missed_since.unwrap_or(Epoch(u64::MAX));
    let disks = |set: u32| -> Vec<DiskId> {
        (0..slot.len()).filter(|n| set >> n & 1 == 1).map(|n| slot[n].disk).collect()
    };
    let set = |is: &dyn Fn(&Standing) -> bool| -> u32 {
        slot.iter().enumerate().map(|(n, s)| u32::from(is(s)) << n).sum()
    };
    // Who missed everything has nothing. Who missed more than is remembered may have everything.
    let mut holding = set(&|s| missed(s) > Epoch(0) && (whole || missed(s) >= known));
    let mut unknown = set(&|s| missed(s) > Epoch(0)) & !holding;
    let mut active = false;
    for (epoch, up, out) in walk(records, slot).into_iter().rev() {
        let in_place = slot.len() - out.count_ones() as usize;
        if (up.count_ones() as usize) < needed_at_home(min_copies, in_place) {
            continue;
        }
        if up & holding != 0 {
            let missing = set(&|s| missed(s) <= epoch) & !up;
            (holding, unknown, active) = (holding & !missing, unknown & !missing, true);
        } else if up & unknown != 0 {
            return Err(Forgotten);
        }
    }
    match (holding, unknown) {
        (0, 1..) => Err(Forgotten),
        _ if whole && !active => Ok(disks(u32::MAX)),
        _ => Ok(disks(holding)),
    }
}

/// Which disks of a slot were up and out in the epochs since the first one that any of them missed,
/// newest first, as sets of their places.
fn walk(records: &[EpochRecord], slot: &[Standing]) -> Vec<(Epoch, u32, u32)> {
    let first = slot.iter().filter_map(|s| s.missed_since).min().unwrap_or(Epoch(u64::MAX));
    let (mut up, mut out) = (0, 0);
    for (n, standing) in slot.iter().enumerate() {
        up |= u32::from(standing.up) << n;
        out |= u32::from(standing.out) << n;
    }
    let set = |list: &[DiskId]| -> u32 {
        slot.iter().enumerate().map(|(n, s)| u32::from(list.contains(&s.disk)) << n).sum()
    };
    let mut epochs = Vec::new();
    for record in records.iter().rev().take_while(|record| record.epoch >= first) {
        epochs.push((record.epoch, up, out));
        up = (up & !set(&record.came_up)) | set(&record.went_down);
        out = (out & !set(&record.went_out)) | set(&record.came_in);
    }
    epochs
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
        assert_eq!(holders(&history, &slot, 2), Ok(vec![A, B]));
    }

    #[test]
    fn a_lonely_survivor_does_not_make_the_others_stale() {
        // B went in 2, A went in 3: with min_copies 2, nothing was written in 3.
        let history = [record(1, &[A, B, C], &[]), record(2, &[], &[B]), record(3, &[], &[A])];
        let slot =
            [standing(A, false, Some(3)), standing(B, false, Some(2)), standing(C, true, None)];
        // C has restarted without anybody noticing.
        assert_eq!(holders(&history, &slot, 2), Ok(vec![A, C]));
        assert_eq!(holders(&history, &slot, 1), Ok(vec![C]));
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
        assert_eq!(holders(&history, &slot, 1), Ok(vec![B]), "A must wait for B");
    }

    #[test]
    fn who_let_a_slot_take_writes_again_is_the_only_one_to_have_them() {
        // C left in 2, B in 3, A in 4, when nothing could be written any more. Then C and A were up
        // and took writes in 6, as A still had everything. A left, and B, which lacks them, came.
        let mut history = vec![
            record(1, &[A, B, C], &[]),
            record(2, &[], &[C]),
            record(3, &[], &[B]),
            record(4, &[], &[A]),
            record(5, &[C], &[]),
            record(6, &[A], &[]),
        ];
        let slot =
            |a, b, c| [standing(A, a, Some(4)), standing(B, b, Some(3)), standing(C, c, Some(2))];
        assert_eq!(holders(&history, &slot(true, false, true), 2), Ok(vec![A]));
        history.extend([record(7, &[], &[A]), record(8, &[B], &[])]);
        assert_eq!(holders(&history, &slot(false, true, true), 2), Ok(vec![A]), "not B");
        // Had it needed three of them, nothing would have been written since 1.
        assert_eq!(holders(&history, &slot(false, true, true), 3), Ok(vec![A, B, C]));
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
        assert_eq!(holders(&died(&history), &slot, 2), Ok(vec![A]));
        // They come back: still only A has what was written meanwhile.
        let mut all = died(&history);
        all.push(EpochRecord { came_in: vec![B, C], ..record(5, &[B, C], &[]) });
        let slot =
            [standing(A, false, Some(4)), standing(B, true, Some(2)), standing(C, true, Some(2))];
        assert_eq!(holders(&all, &slot, 2), Ok(vec![A]));
        // Had they not been out, A alone would have taken none.
        history[2].went_out.clear();
        let mut all = died(&history);
        all.push(record(5, &[B, C], &[]));
        assert_eq!(holders(&all, &slot, 2), Ok(vec![B, C]));
    }

    #[test]
    fn a_cut_history_is_admitted() {
        let slot = [standing(A, true, Some(2))];
        assert_eq!(holders(&[record(9, &[A], &[])], &slot, 1), Err(Forgotten));
        assert_eq!(holders(&[record(1, &[A], &[])], &[], 1), Ok(vec![]));
        // Who is remembered to have everything does not need the rest.
        let slot = [standing(A, true, Some(2)), standing(B, false, Some(10))];
        let history = [record(9, &[B], &[]), record(10, &[A], &[B])];
        assert_eq!(holders(&history, &slot, 2), Ok(vec![B]));
    }
}

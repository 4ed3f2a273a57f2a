//! When this node last had to do with a leader of an earlier term.
//!
//! A leader knows what a quorum acknowledged. Each later leader can find out when that must have
//! ended, whatever became of the earlier one: a majority of the voters tells when they last heard
//! of it, and at least one of them was part of any quorum that it had.

use std::time::Instant;

/// Leaders and candidates that this node heard of, or was, by their terms.
#[derive(Debug)]
pub struct Heard {
    /// The highest term and when a message of it came last.
    latest: (u64, Instant),
    /// When a message of a lower term came last.
    earlier: Instant,
    /// The term in which this node leads.
    led: Option<u64>,
}

impl Heard {
    /// Before its start a node may have heard anything.
    pub fn new(now: Instant) -> Self {
        Self { latest: (0, now), earlier: now, led: None }
    }

    /// A request of a leader or candidate of `term` came.
    pub fn note(&mut self, term: u64, now: Instant) {
        let (latest, at) = self.latest;
        if term > latest {
            self.earlier = self.earlier.max(at);
            self.latest = (term, now);
        } else if term == latest {
            self.latest.1 = now;
        } else {
            self.earlier = now;
        }
    }

    /// This node leads, or does not.
    pub fn note_leading(&mut self, term: u64, leads: bool, now: Instant) {
        // Its own acknowledgements count like messages that came until now.
        if let Some(led) = self.led {
            self.note(led, now);
        }
        self.led = leads.then_some(term);
    }

    /// The latest moment at which this node can have acknowledged a leader of a term before
    /// `term`, if it is sure not to do so any more.
    pub fn before(&self, term: u64, now: Instant) -> Instant {
        match self.led {
            Some(led) if led < term => now,
            _ if self.latest.0 < term => self.earlier.max(self.latest.1),
            _ => self.earlier,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn messages_of_the_term_asked_for_do_not_count() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut heard = Heard::new(start);
        assert_eq!(heard.before(1, at(1)), start, "it may have been another life");
        heard.note(3, at(2));
        heard.note(3, at(4));
        assert_eq!(heard.before(3, at(5)), start);
        assert_eq!(heard.before(4, at(5)), at(4));
        heard.note(4, at(6));
        heard.note(4, at(7));
        assert_eq!(heard.before(4, at(8)), at(4));
        heard.note(3, at(9)); // late, and refused
        assert_eq!(heard.before(4, at(10)), at(9));
        assert_eq!(heard.before(5, at(10)), at(9));
    }

    #[test]
    fn a_leader_hears_itself_until_it_is_one_no_more() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut heard = Heard::new(start);
        heard.note_leading(1, true, at(1));
        assert_eq!(heard.before(2, at(5)), at(5));
        assert_eq!(heard.before(1, at(5)), start);
        heard.note(2, at(6));
        heard.note_leading(2, false, at(7));
        heard.note(2, at(8));
        heard.note_leading(2, false, at(9));
        assert_eq!(heard.before(2, at(9)), at(7));
    }
}

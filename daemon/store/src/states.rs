//! Two bits for each of the 1024 blocks of an object.

use sheepdog_types::BLOCKS_PER_OBJECT;

use crate::api::{BlockRange, BlockState};

/// Bytes of a packed [`States`].
pub(crate) const STATES_BYTES: usize = BLOCKS_PER_OBJECT / 4;

/// The states of an object's blocks: 0 absent, 1 data, 2 zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct States([u8; STATES_BYTES]);

impl Default for States {
    fn default() -> Self {
        Self([0; STATES_BYTES])
    }
}

impl States {
    pub(crate) fn get(&self, block: u16) -> BlockState {
        match self.0[usize::from(block) / 4] >> (block % 4 * 2) & 3 {
            1 => BlockState::Data,
            2 => BlockState::Zero,
            _ => BlockState::Absent,
        }
    }

    pub(crate) fn set(&mut self, block: u16, state: BlockState) {
        let code = match state {
            BlockState::Absent => 0,
            BlockState::Data => 1,
            BlockState::Zero => 2,
        };
        let shift = block % 4 * 2;
        let byte = &mut self.0[usize::from(block) / 4];
        *byte = *byte & !(3 << shift) | code << shift;
    }

    pub(crate) fn bytes(&self) -> &[u8; STATES_BYTES] {
        &self.0
    }

    /// `None` if a state has the unused code 3.
    pub(crate) fn from_bytes(bytes: [u8; STATES_BYTES]) -> Option<Self> {
        let used = bytes.iter().all(|byte| byte & byte >> 1 & 0x55 == 0);
        used.then_some(Self(bytes))
    }

    /// Blocks that are data.
    pub(crate) fn data_blocks(&self) -> u16 {
        // The codes 0, 1, 2 have the low bit set for data only.
        self.0.iter().map(|byte| (byte & 0x55).count_ones() as u16).sum()
    }

    /// Blocks that are zero.
    pub(crate) fn zero_blocks(&self) -> u16 {
        self.0.iter().map(|byte| (byte & 0xAA).count_ones() as u16).sum()
    }

    /// Runs of blocks in `state`, ascending.
    pub(crate) fn runs(&self, state: BlockState) -> impl Iterator<Item = BlockRange> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let rest = next..BlockRange::ALL.end();
            let first = rest.clone().find(|&block| self.get(block) == state)?;
            let end = (first..rest.end).find(|&block| self.get(block) != state);
            next = end.unwrap_or(rest.end);
            BlockRange::new(first, usize::from(next - first))
        })
    }

    /// The blocks in `state`, ascending.
    pub(crate) fn blocks(&self, state: BlockState) -> impl Iterator<Item = u16> + '_ {
        (0..BLOCKS_PER_OBJECT as u16).filter(move |&block| self.get(block) == state)
    }
}

/// What a patch makes of each of an object's blocks: 0 nothing, else what it becomes: 1 data, 2
/// zero, 3 absent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Changes([u8; STATES_BYTES]);

impl Default for Changes {
    fn default() -> Self {
        Self([0; STATES_BYTES])
    }
}

impl Changes {
    pub(crate) fn get(&self, block: u16) -> Option<BlockState> {
        match self.0[usize::from(block) / 4] >> (block % 4 * 2) & 3 {
            1 => Some(BlockState::Data),
            2 => Some(BlockState::Zero),
            3 => Some(BlockState::Absent),
            _ => None,
        }
    }

    pub(crate) fn set(&mut self, block: u16, state: BlockState) {
        let code = match state {
            BlockState::Data => 1,
            BlockState::Zero => 2,
            BlockState::Absent => 3,
        };
        let shift = block % 4 * 2;
        let byte = &mut self.0[usize::from(block) / 4];
        *byte = *byte & !(3 << shift) | code << shift;
    }

    pub(crate) fn bytes(&self) -> &[u8; STATES_BYTES] {
        &self.0
    }

    /// From the tables of a record that carries `data` blocks; `None` if they make no sense.
    pub(crate) fn of_record(tables: &[u8], data: u32) -> Option<Self> {
        let changes = Self(*tables.first_chunk::<STATES_BYTES>()?);
        (changes.data().count() as u32 == data).then_some(changes)
    }

    /// The blocks that change, ascending, with what they become.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u16, BlockState)> + '_ {
        (0..BLOCKS_PER_OBJECT as u16).filter_map(|block| Some((block, self.get(block)?)))
    }

    /// The blocks that get new data, ascending.
    pub(crate) fn data(&self) -> impl Iterator<Item = u16> + '_ {
        self.iter().filter(|(_, state)| *state == BlockState::Data).map(|(block, _)| block)
    }
}

/// The states of a layer in as little memory as they need: most layers are all data.
#[derive(Clone, Debug)]
pub(crate) enum CompactStates {
    /// All blocks are in this state.
    Uniform(BlockState),
    Mixed(Box<States>),
}

impl CompactStates {
    pub(crate) fn new(states: States) -> Self {
        let first = states.0[0];
        let uniform = matches!(first, 0x00 | 0x55 | 0xAA) && states.0.iter().all(|b| *b == first);
        if uniform { Self::Uniform(states.get(0)) } else { Self::Mixed(Box::new(states)) }
    }

    pub(crate) fn get(&self, block: u16) -> BlockState {
        match self {
            Self::Uniform(state) => *state,
            Self::Mixed(states) => states.get(block),
        }
    }

    pub(crate) fn expand(&self) -> States {
        match self {
            Self::Mixed(states) => (**states).clone(),
            Self::Uniform(BlockState::Absent) => States::default(),
            Self::Uniform(BlockState::Data) => States([0x55; STATES_BYTES]),
            Self::Uniform(BlockState::Zero) => States([0xAA; STATES_BYTES]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compact_states_are_the_same_states() {
        for state in [BlockState::Absent, BlockState::Data, BlockState::Zero] {
            let mut states = States::default();
            (0..1024).for_each(|block| states.set(block, state));
            let compact = CompactStates::new(states.clone());
            assert!(matches!(compact, CompactStates::Uniform(s) if s == state));
            assert_eq!((compact.get(1023), compact.expand()), (state, states.clone()));
            let other = if state == BlockState::Zero { BlockState::Data } else { BlockState::Zero };
            states.set(1023, other);
            let compact = CompactStates::new(states.clone());
            assert!(matches!(compact, CompactStates::Mixed(_)));
            assert_eq!((compact.get(1022), compact.get(1023)), (state, other));
            assert_eq!(compact.expand(), states);
        }
    }

    #[test]
    fn every_change_is_kept_and_counted() {
        let mut changes = Changes::default();
        for block in 0..BLOCKS_PER_OBJECT as u16 {
            changes.set(block, [BlockState::Zero, BlockState::Data][usize::from(block % 3 == 0)]);
        }
        changes.set(3, BlockState::Absent);
        assert_eq!(changes.data().count(), 341);
        assert_eq!(changes.iter().nth(3), Some((3, BlockState::Absent)));
        assert_eq!(Changes::of_record(changes.bytes(), 341), Some(changes.clone()));
        assert_eq!(Changes::of_record(changes.bytes(), 342), None);
        assert_eq!(Changes::of_record(&[0; STATES_BYTES - 1], 0), None);
        assert_eq!(Changes::default().iter().next(), None);
    }

    #[test]
    fn every_block_keeps_its_own_state() {
        let mut states = States::default();
        for block in 0..BLOCKS_PER_OBJECT as u16 {
            states.set(block, [BlockState::Zero, BlockState::Data][usize::from(block % 3 == 0)]);
        }
        states.set(3, BlockState::Absent);
        assert_eq!((states.data_blocks(), states.zero_blocks()), (341, 682));
        assert_eq!(states.get(3), BlockState::Absent);
        assert_eq!(states.blocks(BlockState::Data).next(), Some(0));
        assert_eq!(States::from_bytes(*states.bytes()), Some(states));
        assert_eq!(States::from_bytes([3; STATES_BYTES]), None);
    }
}

//! Newtypes for ids and versions, so that no bare integer crosses a module border.

use std::fmt;
use std::str::FromStr;

macro_rules! int_newtype {
    ($(#[$doc:meta])* $name:ident($int:ty), $fmt:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $fmt, self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(", $fmt, ")"), self.0)
            }
        }
    };
}

macro_rules! parse_hex {
    ($name:ident) => {
        impl FromStr for $name {
            type Err = std::num::ParseIntError;

            /// Parses the hexadecimal form that `Display` prints.
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                u64::from_str_radix(text, 16).map(Self)
            }
        }
    };
}

int_newtype!(
    /// A cluster, chosen at random when its first node starts. Never 0.
    ClusterId(u64), "{:016x}"
);
int_newtype!(
    /// A host running `sheep`, chosen at random when its directory is created. Never 0.
    NodeId(u64), "{:016x}"
);
int_newtype!(
    /// A disk: one directory given to `sheep`, the member of the placement ring.
    DiskId(u64), "{:016x}"
);
parse_hex!(ClusterId);
parse_hex!(NodeId);
parse_hex!(DiskId);

int_newtype!(
    /// A volume. Assigned by the cluster log, counting up, never used twice (I9).
    VolumeId(u64), "{}"
);
int_newtype!(
    /// Number of a committed cluster membership; grows by one with each change.
    Epoch(u64), "{}"
);
int_newtype!(
    /// Fencing token: grows with each attach of a volume and is stamped on every write (I4).
    WriterGen(u64), "{}"
);
int_newtype!(
    /// A volume's generation between two snapshots; only the newest is writable.
    Layer(u32), "{}"
);
int_newtype!(
    /// Position of an object in its volume, in units of [`crate::OBJECT_SIZE`].
    ObjectIndex(u32), "{}"
);
int_newtype!(
    /// One of [`crate::SLOTS`] equal arcs of the hash space.
    SlotId(u16), "{}"
);

impl Epoch {
    /// The next epoch.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// One 4 MiB piece of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ObjectId {
    /// The volume it belongs to.
    pub volume: VolumeId,
    /// Its position in the volume.
    pub index: ObjectIndex,
}

impl ObjectId {
    /// The slot of this object: a hash of volume and index, the same on every node for ever.
    #[must_use]
    pub fn slot(self) -> SlotId {
        let hash = hash64(hash64(self.volume.0) ^ u64::from(self.index.0));
        SlotId((hash >> 48) as u16)
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.volume, self.index)
    }
}

/// One layer of one object: the unit that the store keeps versions and blocks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LayerKey {
    /// The object.
    pub object: ObjectId,
    /// The layer of the object's volume.
    pub layer: Layer,
}

impl fmt::Display for LayerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.object, self.layer)
    }
}

/// Version of an object layer: the last write applied to it.
///
/// Ordered by writer generation first. Within one generation the content of a version is the same
/// on every replica (I5). `Version::NONE` is an object layer that was never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Version {
    /// Generation of the writer.
    pub writer: WriterGen,
    /// Counts the writes to this object layer, from 1, without gaps, across writers.
    pub seq: u64,
}

impl Version {
    /// Never written.
    pub const NONE: Self = Self { writer: WriterGen(0), seq: 0 };

    /// The version after one more write by `writer`.
    #[must_use]
    pub fn next(self, writer: WriterGen) -> Self {
        Self { writer, seq: self.seq + 1 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.writer, self.seq)
    }
}

/// Mixes 64 bits so that every input bit changes every output bit with probability one half.
///
/// The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators", OOPSLA 2014). Placement depends on it: it must never change.
#[must_use]
pub fn hash64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_by_writer_first() {
        let old = Version { writer: WriterGen(1), seq: 9 };
        let new = Version { writer: WriterGen(2), seq: 3 };
        assert!(Version::NONE < old && old < new);
        assert_eq!(old.next(WriterGen(2)), Version { writer: WriterGen(2), seq: 10 });
    }

    #[test]
    fn slots_never_move() {
        // Fixed values: a change here would orphan every object ever stored.
        assert_eq!(hash64(0), 0xE220_A839_7B1D_CDAF);
        let slot = |v, i| ObjectId { volume: VolumeId(v), index: ObjectIndex(i) }.slot();
        assert_eq!(slot(1, 0), slot(1, 0));
        assert_ne!(slot(1, 0), slot(1, 1));
    }

    #[test]
    fn slots_spread_evenly() {
        let mut counts = vec![0u32; 256];
        for index in 0..65_536 {
            let id = ObjectId { volume: VolumeId(7), index: ObjectIndex(index) };
            counts[usize::from(id.slot().0 >> 8)] += 1;
        }
        // 256 expected in each bin, standard deviation 16.
        assert!(counts.iter().all(|&n| (160..352).contains(&n)), "{counts:?}");
    }

    #[test]
    fn ids_print_and_parse() {
        let id = NodeId(0xdead_beef);
        assert_eq!(id.to_string(), "00000000deadbeef");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("xyz".parse::<NodeId>().is_err());
    }
}

//! A slab whose keys are never reused while a late answer may still name them.

/// Stores values under 64-bit keys: the low half is a place, the high half counts its uses, so a
/// key that was removed stays unknown. Insertion, lookup and removal take constant time.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Place<T> {
    uses: u32,
    value: Option<T>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Stores `value` and gives its key.
    pub fn insert(&mut self, value: T) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { uses: 0, value: None });
            (self.places.len() - 1) as u32
        });
        let place = &mut self.places[at as usize];
        place.uses = place.uses.wrapping_add(1).max(1); // key 0 is never given out
        place.value = Some(value);
        (u64::from(place.uses) << 32) | u64::from(at)
    }

    fn place(&self, key: u64) -> Option<usize> {
        let at = (key & 0xFFFF_FFFF) as usize;
        (self.places.get(at)?.uses == (key >> 32) as u32).then_some(at)
    }

    /// The value under `key`.
    #[must_use]
    pub fn get(&self, key: u64) -> Option<&T> {
        self.places[self.place(key)?].value.as_ref()
    }

    /// The value under `key`, to change.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let at = self.place(key)?;
        self.places[at].value.as_mut()
    }

    /// Takes the value under `key` out.
    pub fn remove(&mut self, key: u64) -> Option<T> {
        let at = self.place(key)?;
        let value = self.places[at].value.take();
        if value.is_some() {
            self.free.push(at as u32);
        }
        value
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All keys with their values.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.places.iter().enumerate().filter_map(|(at, place)| {
            let key = (u64::from(place.uses) << 32) | at as u64;
            place.value.as_ref().map(|value| (key, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_keys_stay_unknown() {
        let mut slab = Slab::default();
        let first = slab.insert("a");
        assert_eq!(slab.remove(first), Some("a"));
        let second = slab.insert("b");
        assert_ne!(first, second);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&"b"));
        assert_eq!((slab.len(), slab.iter().count()), (1, 1));
    }
}

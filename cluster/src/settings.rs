//! Settings of the whole cluster, agreed through the log and known to every node.

use crate::command::Refusal;
use serde::{Deserialize, Serialize};
use sheepdog_types::{format_size, parse_size};

/// Longest `down-out-interval`: a year.
const MAX_INTERVAL: u64 = 366 * 24 * 3600;
/// Most layers that a disk copies at once.
const MAX_OBJECTS: u16 = 64;
/// Slowest recovery that can be asked for: below, it would not end.
const MIN_BANDWIDTH: u64 = 64 << 10;

/// All settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Seconds that a disk may be down before others take its place; 0 means never.
    pub down_out_interval: u64,
    /// Most bytes per second that the background recovery of one disk moves; 0 means as many as
    /// clients leave.
    pub recovery_max_bandwidth: u64,
    /// Most layers that the background recovery of one disk copies at once.
    pub recovery_max_objects: u16,
    /// Background recovery stands still. What a VM needs is recovered nevertheless.
    pub recovery_paused: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            down_out_interval: 600,
            recovery_max_bandwidth: 0,
            recovery_max_objects: 4,
            recovery_paused: false,
        }
    }
}

/// A setting with its new value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Setting {
    /// [`Settings::down_out_interval`].
    DownOutInterval(u64),
    /// [`Settings::recovery_max_bandwidth`].
    RecoveryMaxBandwidth(u64),
    /// [`Settings::recovery_max_objects`].
    RecoveryMaxObjects(u16),
    /// [`Settings::recovery_paused`].
    RecoveryPaused(bool),
}

/// Name, values for people, what it means.
pub const NAMES: [(&str, &str, &str); 4] = [
    (
        "down-out-interval",
        "90s, 10m, 2h, 1d or never",
        "how long a disk may be down before others take its place",
    ),
    (
        "recovery.max-bandwidth",
        "bytes per second like 50M, or unlimited",
        "most that the background recovery of each disk moves",
    ),
    ("recovery.max-objects", "1 to 64", "objects that each disk recovers at once"),
    ("recovery.paused", "true or false", "whether background recovery stands still"),
];

impl Setting {
    /// A setting from what an operator wrote.
    ///
    /// # Errors
    /// [`Refusal::BadSetting`] with the values that there are.
    pub fn parse(name: &str, value: &str) -> Result<Self, Refusal> {
        let bad = || match NAMES.iter().find(|(known, ..)| *known == name) {
            Some((_, values, _)) => {
                Refusal::BadSetting(format!("'{value}' is not a value of {name}: use {values}"))
            }
            None => {
                let names: Vec<&str> = NAMES.iter().map(|(name, ..)| *name).collect();
                Refusal::BadSetting(format!(
                    "there is no setting '{name}'; there are {}",
                    names.join(", ")
                ))
            }
        };
        let setting = match name {
            "down-out-interval" => parse_interval(value).map(Self::DownOutInterval),
            "recovery.max-bandwidth" if value == "unlimited" => Some(Self::RecoveryMaxBandwidth(0)),
            "recovery.max-bandwidth" => parse_size(value).ok().map(Self::RecoveryMaxBandwidth),
            "recovery.max-objects" => value.parse().ok().map(Self::RecoveryMaxObjects),
            "recovery.paused" => value.parse().ok().map(Self::RecoveryPaused),
            _ => None,
        };
        let setting = setting.ok_or_else(bad)?;
        setting.check().map_err(|_| bad())?;
        Ok(setting)
    }

    /// Checks the value.
    ///
    /// # Errors
    /// [`Refusal::BadSetting`].
    pub fn check(&self) -> Result<(), Refusal> {
        let fits = match *self {
            Self::DownOutInterval(seconds) => seconds <= MAX_INTERVAL,
            Self::RecoveryMaxBandwidth(bytes) => bytes == 0 || bytes >= MIN_BANDWIDTH,
            Self::RecoveryMaxObjects(count) => (1..=MAX_OBJECTS).contains(&count),
            Self::RecoveryPaused(_) => true,
        };
        let text =
            || format!("{self:?} is out of range; least bandwidth is {MIN_BANDWIDTH} bytes/s");
        if fits { Ok(()) } else { Err(Refusal::BadSetting(text())) }
    }
}

impl Settings {
    /// Changes one setting.
    pub fn set(&mut self, setting: &Setting) {
        match *setting {
            Setting::DownOutInterval(seconds) => self.down_out_interval = seconds,
            Setting::RecoveryMaxBandwidth(bytes) => self.recovery_max_bandwidth = bytes,
            Setting::RecoveryMaxObjects(count) => self.recovery_max_objects = count,
            Setting::RecoveryPaused(paused) => self.recovery_paused = paused,
        }
    }

    /// All settings by name, as [`Setting::parse`] reads them.
    #[must_use]
    pub fn list(&self) -> [(&'static str, String); 4] {
        let interval = match self.down_out_interval {
            0 => "never".into(),
            seconds => format!("{seconds}s"),
        };
        let bandwidth = match self.recovery_max_bandwidth {
            0 => "unlimited".into(),
            bytes => format_size(bytes),
        };
        [
            (NAMES[0].0, interval),
            (NAMES[1].0, bandwidth),
            (NAMES[2].0, self.recovery_max_objects.to_string()),
            (NAMES[3].0, self.recovery_paused.to_string()),
        ]
    }
}

/// Seconds; a number without a unit is seconds.
fn parse_interval(text: &str) -> Option<u64> {
    if text == "never" {
        return Some(0);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[digits..] {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    let seconds = text[..digits].parse::<u64>().ok()?.checked_mul(unit)?;
    (seconds > 0).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_back_as_they_are_listed() {
        let mut settings = Settings::default();
        for (name, value) in [
            ("down-out-interval", "2h"),
            ("recovery.max-bandwidth", "50M"),
            ("recovery.max-objects", "9"),
            ("recovery.paused", "true"),
        ] {
            settings.set(&Setting::parse(name, value).unwrap());
        }
        assert_eq!(settings.down_out_interval, 7200);
        assert_eq!((settings.recovery_max_objects, settings.recovery_paused), (9, true));
        let mut again = Settings::default();
        for (name, value) in settings.list() {
            again.set(&Setting::parse(name, &value).unwrap());
        }
        assert_eq!(again, settings);
        let never = Setting::parse("down-out-interval", "never").unwrap();
        assert_eq!(never, Setting::DownOutInterval(0));
    }

    #[test]
    fn nonsense_is_refused_with_what_there_is() {
        for (name, value) in [
            ("down-out-interval", "0"),
            ("down-out-interval", "10 parsecs"),
            ("down-out-interval", "99999999999999999999d"),
            ("recovery.max-bandwidth", "1"),
            ("recovery.max-objects", "0"),
            ("recovery.max-objects", "65"),
            ("recovery.paused", "maybe"),
        ] {
            let text = Setting::parse(name, value).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains("use"), "{text}");
        }
        let text = Setting::parse("colour", "blue").unwrap_err().to_string();
        assert!(text.contains("down-out-interval"), "{text}");
    }
}

//! How many objects scenes have: `1-2` on the command line and in recipes.

use std::str::FromStr;

use serde::Deserialize;

/// Fewest and most objects of a scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Objects(pub(crate) [usize; 2]);

impl FromStr for Objects {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse::<usize>().ok();
        let (fewest, most) = text.split_once('-').unwrap_or((text, text));
        match (number(fewest), number(most)) {
            (Some(fewest), Some(most)) if (1..=most).contains(&fewest) && most <= 6 => {
                Ok(Self([fewest, most]))
            }
            _ => Err(format!("`{text}` is no number of objects: expected `1-2`, at most 6")),
        }
    }
}

impl TryFrom<String> for Objects {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_nonsense_is_not() {
        assert_eq!("2-6".parse(), Ok(Objects([2, 6])));
        assert_eq!("3".parse(), Ok(Objects([3, 3])));
        for wrong in ["", "0-2", "3-2", "1-7", "a-b", "1-2-3"] {
            assert!(wrong.parse::<Objects>().is_err(), "{wrong}");
        }
    }
}

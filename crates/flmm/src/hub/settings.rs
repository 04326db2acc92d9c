//! Where the hub and its cache are: the environment variables of the `huggingface_hub` library.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Result};

/// Where to look for models, and how patiently.
#[derive(Clone)]
pub struct HubSettings {
    /// The server, without a final `/`: `HF_ENDPOINT`, else `https://huggingface.co`.
    pub endpoint: String,
    /// The cache: `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// Who asks: `HF_TOKEN`, else the file `token` in `HF_HOME` (`hf auth login` writes it).
    pub token: Option<String>,
    /// Whether the network must not be used: `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// How often a request is made that brings nothing before it counts as failed.
    pub attempts: u32,
    /// Wait before the second attempt; doubled for each further one.
    pub pause: Duration,
    /// How long a connection may stay silent.
    pub silence: Duration,
}

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

impl HubSettings {
    /// The settings of this process's environment.
    ///
    /// # Errors
    /// [`Error::Hub`] if a variable has a value that cannot be used, or if no variable says where the cache is.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(&|name| std::env::var(name).ok())
    }

    /// The settings that variables looked up by `var` describe.
    pub fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| value(name, var);
        let flag = |name: &str| {
            set(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        let path = |text: String| expanded(text, var);
        let home = set("HF_HOME").map(path);
        let home = home.or_else(|| Some(cache_folder(var)?.join("huggingface")));
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).map(path);
        let cache = cache.or_else(|| home.as_ref().map(|home| home.join("hub"))).ok_or_else(|| {
            Error::hub("it is not known where downloaded models are kept", "set HF_HOME to a folder")
        })?;
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::hub(
                format!(
                    "HF_ENDPOINT is `{endpoint}`, expected an address that begins with https:// or http://"
                ),
                format!("correct it, or remove it to use {DEFAULT_ENDPOINT}"),
            ));
        }
        let token_file =
            set("HF_TOKEN_PATH").map(path).or_else(|| home.as_ref().map(|home| home.join("token")));
        let token = match flag("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            true => None,
            false => set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
                let text = std::fs::read_to_string(token_file?).ok()?;
                Some(text.trim().to_owned()).filter(|token| !token.is_empty())
            }),
        };
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token,
            offline: flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE"),
            attempts: 5,
            pause: Duration::from_millis(500),
            silence: Duration::from_secs(30),
        })
    }
}

/// The user's cache folder: `XDG_CACHE_HOME`, else `~/.cache`; `None` if no variable says where that is.
pub fn user_cache() -> Option<PathBuf> {
    cache_folder(&|name| std::env::var(name).ok())
}

fn cache_folder(var: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let set = value("XDG_CACHE_HOME", var).map(|text| expanded(text, var));
    set.or_else(|| Some(user_folder(var)?.join(".cache")))
}

fn user_folder(var: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    value("HOME", var).or_else(|| value("USERPROFILE", var)).map(PathBuf::from)
}

/// A path as it was typed, `~` in its place.
fn expanded(text: String, var: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    match (text.strip_prefix("~/"), user_folder(var)) {
        (Some(rest), Some(user)) => user.join(rest),
        _ => PathBuf::from(text),
    }
}

/// A variable that is set to more than blanks.
fn value(name: &str, var: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    var(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

impl std::fmt::Debug for HubSettings {
    /// Everything but the token, which must not get into logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> Result<HubSettings> {
        HubSettings::from_vars(&|name| {
            vars.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn variables_are_those_of_huggingface_hub() -> Result<()> {
        let plain = settings(&[("HOME", "/home/u")])?;
        assert_eq!(plain.cache, PathBuf::from("/home/u/.cache/huggingface/hub"));
        assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), (DEFAULT_ENDPOINT, None, false));
        let cache = |vars: &[(&str, &str)]| settings(vars).map(|s| s.cache);
        assert_eq!(cache(&[("HOME", "/u"), ("XDG_CACHE_HOME", "/c")])?, PathBuf::from("/c/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/u"), ("HF_HOME", "~/hf")])?, PathBuf::from("/u/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/data")])?, PathBuf::from("/data"));
        assert!(cache(&[]).is_err());
        let other = settings(&[
            ("HF_HOME", "/none"),
            ("HF_ENDPOINT", "http://mirror:80/"),
            ("HF_TOKEN", " hf_x\n"),
            ("HF_HUB_OFFLINE", "true"),
        ])?;
        assert_eq!((other.endpoint.as_str(), other.offline), ("http://mirror:80", true));
        assert_eq!(other.token.as_deref(), Some("hf_x"));
        assert!(!format!("{other:?}").contains("hf_x"));
        assert!(settings(&[("HF_HOME", "/none"), ("HF_ENDPOINT", "mirror")]).is_err());
        assert!(!settings(&[("HF_HOME", "/none"), ("HF_HUB_OFFLINE", "0")])?.offline);
        Ok(())
    }

    #[test]
    fn the_token_file_is_read() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::io("", e))?;
        std::fs::write(folder.path().join("token"), "hf_file\n").map_err(|e| Error::io("", e))?;
        let home = folder.path().display().to_string();
        let token = |vars: &[(&str, &str)]| settings(vars).map(|s| s.token);
        assert_eq!(token(&[("HF_HOME", &home)])?.as_deref(), Some("hf_file"));
        assert_eq!(token(&[("HF_HOME", &home), ("HF_TOKEN", "hf_env")])?.as_deref(), Some("hf_env"));
        assert_eq!(token(&[("HF_HOME", &home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")])?, None);
        Ok(())
    }
}

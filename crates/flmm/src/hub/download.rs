//! One file: resumed where it broke off, checked, renamed into the cache when it is whole.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::cache::{RepoCache, create_parent};
use super::http::{Client, Fault, Metadata, text, transport};
use super::repo::{RepoId, is_hex};
use super::settings::HubSettings;
use crate::error::{Error, Result};

/// Bytes that are read at a time.
const BLOCK: usize = 1 << 18;

/// A file of a repository at a commit.
pub(super) struct Wanted<'a> {
    pub(super) repo: &'a RepoId,
    pub(super) commit: &'a str,
    pub(super) name: &'a str,
}

/// Repeats `request` while its faults are passing. `progress` tells how far the whole has come; a fault after some
/// progress starts the count of attempts anew.
pub(super) fn patiently<T>(
    settings: &HubSettings,
    progress: &dyn Fn() -> u64,
    mut request: impl FnMut() -> Result<T, Fault>,
) -> Result<T, Fault> {
    let (mut failed, mut reached) = (0, progress());
    loop {
        let fault = match request() {
            Err(Fault::Passing(what)) => Fault::Passing(what),
            other => return other,
        };
        if progress() > reached {
            (failed, reached) = (0, progress());
        }
        failed += 1;
        if failed >= settings.attempts {
            return Err(fault);
        }
        std::thread::sleep(settings.pause * 2u32.saturating_pow(failed - 1));
    }
}

/// Makes sure that the blob `metadata.etag` is in the cache. `progress` gets the number of bytes that are there.
pub(super) fn blob(
    client: &Client,
    settings: &HubSettings,
    cache: &RepoCache,
    wanted: &Wanted<'_>,
    metadata: &Metadata,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Fault> {
    let _lock = cache.lock(&metadata.etag).map_err(Fault::Final)?;
    let blob = cache.blob(&metadata.etag);
    // Another process may have been faster. A blob of another size is damaged and made anew.
    if let Ok(found) = blob.metadata()
        && metadata.size.is_none_or(|size| size == found.len())
    {
        progress(found.len());
        return Ok(());
    }
    let partial = cache.incomplete(&metadata.etag);
    create_parent(&partial).map_err(Fault::Final)?;
    let at = std::cell::Cell::new(length(&partial));
    patiently(settings, &|| at.get(), || {
        let resumed = length(&partial);
        rest(client, wanted, metadata, &partial, &mut |bytes| {
            at.set(bytes);
            progress(bytes);
        })?;
        match check(wanted, metadata, &partial) {
            Ok(()) => Ok(()),
            Err(error) => {
                discard(&partial);
                at.set(0);
                // What an earlier attempt had left may have been damaged: worth one from the beginning.
                Err(if resumed > 0 { Fault::Passing(error.to_string()) } else { Fault::Final(error) })
            }
        }
    })?;
    std::fs::rename(&partial, &blob).map_err(|e| Fault::Final(Error::io(&blob, e)))
}

/// Appends what is missing to `partial`.
fn rest(
    client: &Client,
    wanted: &Wanted<'_>,
    metadata: &Metadata,
    partial: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Fault> {
    let io = |e| Fault::Final(Error::io(partial, e));
    let mut from = length(partial);
    if metadata.size.is_some_and(|size| from > size) {
        discard(partial);
        from = 0;
    }
    if from > 0 && metadata.size == Some(from) {
        return Ok(());
    }
    let answer = client.content(wanted.repo, wanted.commit, wanted.name, from).map_err(Fault::passing)?;
    // A server that knows no ranges sends everything; one that sends another range is not believed.
    let start = match answer.status().as_u16() {
        206 => text(&answer, "content-range").and_then(|range| {
            range
                .strip_prefix("bytes ")?
                .split('-')
                .next()?
                .parse::<u64>()
                .ok()
                .filter(|&start| start == from)
        }),
        416 => None,
        _ => Some(0),
    };
    let Some(start) = start else {
        discard(partial);
        return Err(Fault::Passing("the server sent another part of the file than was asked for".to_owned()));
    };
    let mut file = File::options().create(true).append(true).open(partial).map_err(io)?;
    file.set_len(start).map_err(io)?;
    let mut at = start;
    let mut reader = answer.into_body().into_reader();
    let mut block = vec![0; BLOCK];
    progress(at);
    loop {
        let count = reader.read(&mut block).map_err(|e| transport(ureq::Error::from(e)))?;
        if count == 0 {
            break;
        }
        file.write_all(&block[..count]).map_err(io)?;
        at += count as u64;
        progress(at);
        if metadata.size.is_some_and(|size| at > size) {
            break;
        }
    }
    file.sync_all().map_err(io)?;
    match metadata.size {
        Some(size) if at < size => {
            Err(Fault::Passing(format!("the connection was cut after {at} of {size} bytes")))
        }
        _ => Ok(()),
    }
}

/// Compares size and, where the name of the content is its SHA-256, content.
fn check(wanted: &Wanted<'_>, metadata: &Metadata, partial: &Path) -> Result<()> {
    let refuse = |what: String| {
        let hint = "try again; if it stays like this, something between you and the hub changes files";
        Err(Error::hub(format!("{}: `{}` {what}; it was not kept", wanted.repo, wanted.name), hint))
    };
    let found = length(partial);
    if let Some(size) = metadata.size.filter(|&size| size != found) {
        return refuse(format!("has {found} bytes instead of {size}"));
    }
    if is_hex(&metadata.etag, 64) {
        let sum = sha256(partial)?;
        if sum != metadata.etag {
            return refuse(format!("has the checksum {sum} instead of {}", metadata.etag));
        }
    }
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let failed = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(failed)?;
    let (mut hash, mut block) = (Sha256::new(), vec![0; BLOCK]);
    loop {
        match file.read(&mut block).map_err(failed)? {
            0 => return Ok(crate::hex(hash.finalize())),
            count => hash.update(&block[..count]),
        }
    }
}

/// Length of the file at `path`, 0 if there is none.
fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

/// Removes what cannot be used; if that fails, the next attempt does the same again.
fn discard(path: &Path) {
    let _ = std::fs::remove_file(path);
}

//! METEOR's tables, read from the files that its authors distribute: function words and WordNet synonyms (in the
//! program's archive), paraphrases (`paraphrase-en.gz`).

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flmm::{Error, Result};

/// Names of the tables inside the archive or a folder that it was unpacked to.
const FUNCTION_WORDS: &str = "function/english.words";
const PREFIXES: &str = "nonbreaking/english.prefixes";
const SYNSETS: &str = "synonym/english.synsets";
const EXCEPTIONS: &str = "synonym/english.exceptions";
/// Where the paraphrase table lies, seen from the archive's folder.
const PARAPHRASES: [&str; 2] = ["paraphrase-en.gz", "data/paraphrase-en.gz"];
const HINT: &str = "METEOR 1.5's files: meteor-1.5.jar with paraphrase-en.gz beside it or in data/ (see docs/evaluation-gcg.md)";

/// Words without content, for scoring without METEOR's own list.
const OWN_FUNCTION_WORDS: &str = "a an the this that these those some any all each no not and or but if than as of in \
on at to from by with without into onto over under for about up down out off near is are was were be been being has have \
had do does did it its he him his she her they them their we us our you your i me my who which what there here while";

/// What METEOR knows of the language.
#[derive(Debug, Clone, Default)]
pub struct MeteorData {
    function_words: HashSet<String>,
    kept_dots: HashSet<String>,
    synonyms: Option<Synonyms>,
    paraphrases: Option<PathBuf>,
}

impl MeteorData {
    /// Without any table: exact and stem matches, a short list of function words. Scores are lower than METEOR's.
    pub fn lite() -> Self {
        let function_words = OWN_FUNCTION_WORDS.split_whitespace().map(str::to_owned).collect();
        Self { function_words, ..Self::default() }
    }

    /// Reads the tables at `path`: METEOR's archive (`meteor-1.5.jar`), the folder it lies in, or a folder that it was
    /// unpacked to. The paraphrase table is looked for beside the archive and in `data/`; it is read when captions
    /// are scored.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Config`] if there is no archive, or if a table is missing or malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let is_folder = path.is_dir();
        let archive = match is_folder {
            true if path.join(FUNCTION_WORDS).is_file() => None,
            true => Some(archive_in(path)?),
            false => Some(path.to_owned()),
        };
        let folder = if is_folder { path } else { path.parent().unwrap_or(Path::new(".")) };
        let mut tables = match &archive {
            Some(file) => Tables::Archive(file, open_archive(file)?),
            None => Tables::Folder(path),
        };
        let lines = |text: String| text.lines().map(str::to_owned).collect::<HashSet<_>>();
        Ok(Self {
            function_words: lines(tables.text(FUNCTION_WORDS)?),
            kept_dots: kept_dots(&tables.text(PREFIXES)?),
            synonyms: Some(Synonyms::parse(&tables.text(SYNSETS)?, &tables.text(EXCEPTIONS)?, path)?),
            paraphrases: PARAPHRASES.iter().map(|name| folder.join(name)).find(|file| file.is_file()),
        })
    }

    /// What scores made with these tables may be called.
    pub fn label(&self) -> &'static str {
        match (&self.synonyms, &self.paraphrases) {
            (Some(_), Some(_)) => "METEOR",
            (Some(_), None) => "METEOR (lite: no paraphrases)",
            _ => "METEOR (lite: exact and stem matches only)",
        }
    }

    pub(super) fn function_words(&self) -> &HashSet<String> {
        &self.function_words
    }

    pub(super) fn kept_dots(&self) -> &HashSet<String> {
        &self.kept_dots
    }

    pub(super) fn synonyms(&self) -> Option<&Synonyms> {
        self.synonyms.as_ref()
    }

    /// The paraphrases of phrases in these sentences; the whole table has five million.
    pub(super) fn paraphrases_of(&self, sentences: &[Vec<String>]) -> Result<Option<Paraphrases>> {
        self.paraphrases.as_ref().map(|file| Paraphrases::read(file, sentences)).transpose()
    }
}

enum Tables<'a> {
    Archive(&'a Path, zip::ZipArchive<File>),
    Folder(&'a Path),
}

impl Tables<'_> {
    fn text(&mut self, name: &str) -> Result<String> {
        let mut bytes = Vec::new();
        match self {
            Self::Folder(folder) => {
                let file = folder.join(name);
                bytes = std::fs::read(&file).map_err(|e| Error::io(file, e))?;
            }
            Self::Archive(file, archive) => {
                let damaged =
                    |e: String| Error::config(&**file, format!("`{name}` cannot be read: {e}"), HINT);
                let mut entry = archive.by_name(name).map_err(|e| damaged(e.to_string()))?;
                entry.read_to_end(&mut bytes).map_err(|e| damaged(e.to_string()))?;
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn archive_in(folder: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut archives: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|file| {
            let name = file.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
            name.starts_with("meteor") && name.ends_with(".jar")
        })
        .collect();
    archives.sort();
    archives.pop().ok_or_else(|| Error::config(folder, "no METEOR tables here", HINT))
}

fn open_archive(file: &Path) -> Result<zip::ZipArchive<File>> {
    let reader = File::open(file).map_err(|e| Error::io(file, e))?;
    zip::ZipArchive::new(reader).map_err(|e| Error::config(file, format!("not an archive: {e}"), HINT))
}

/// Abbreviations that keep their dot whatever follows; those only before numbers are left out, as METEOR sees no
/// capital letters.
fn kept_dots(text: &str) -> HashSet<String> {
    let plain = |line: &&str| !line.starts_with('#') && !line.contains("#NUMERIC_ONLY#");
    text.lines().map(str::trim).filter(|line| !line.is_empty()).filter(plain).map(str::to_owned).collect()
}

/// WordNet: the senses of words.
#[derive(Debug, Clone, Default)]
pub(super) struct Synonyms {
    senses: HashMap<String, Vec<u32>>,
    /// Irregular forms and their base forms.
    bases: HashMap<String, Vec<String>>,
}

impl Synonyms {
    /// Both files have pairs of lines: a word and its senses; a base form and its irregular forms.
    fn parse(synsets: &str, exceptions: &str, origin: &Path) -> Result<Self> {
        let mut found = Self::default();
        let mut lines = synsets.lines();
        while let (Some(word), Some(senses)) = (lines.next(), lines.next()) {
            let senses: std::result::Result<Vec<u32>, _> =
                senses.split_whitespace().map(str::parse).collect();
            let senses = senses.map_err(|e| {
                Error::config(
                    origin,
                    format!("`{SYNSETS}`: the senses of `{word}` are no numbers: {e}"),
                    HINT,
                )
            })?;
            found.senses.insert(word.to_owned(), senses);
        }
        let mut lines = exceptions.lines();
        while let (Some(base), Some(forms)) = (lines.next(), lines.next()) {
            for form in forms.split_whitespace() {
                found.bases.entry(form.to_owned()).or_default().push(base.to_owned());
            }
        }
        Ok(found)
    }

    /// The senses of a word itself and of its base form.
    pub(super) fn senses(&self, word: &str) -> Vec<u32> {
        let of = |word: &str| self.senses.get(word).into_iter().flatten().copied();
        let mut senses: Vec<u32> = of(word).collect();
        match self.bases.get(word) {
            Some(bases) => senses.extend(bases.iter().flat_map(|base| of(base))),
            None => senses.extend(of(&self.base(word))),
        }
        senses
    }

    /// WordNet's rules for regular endings: the first one that leads to a known word.
    fn base(&self, word: &str) -> String {
        const ENDINGS: [(&str, &str); 20] = [
            ("s", ""),
            ("ses", "s"),
            ("xes", "x"),
            ("zes", "z"),
            ("ches", "ch"),
            ("shes", "sh"),
            ("men", "man"),
            ("ies", "y"),
            ("s", ""),
            ("ies", "y"),
            ("es", "e"),
            ("es", ""),
            ("ed", "e"),
            ("ed", ""),
            ("ing", "e"),
            ("ing", ""),
            ("er", ""),
            ("est", ""),
            ("er", "e"),
            ("est", "e"),
        ];
        if word.ends_with("ss") || word.chars().count() <= 2 {
            return word.to_owned();
        }
        let candidates =
            ENDINGS.iter().filter_map(|(ending, by)| Some(word.strip_suffix(ending)?.to_owned() + by));
        candidates.into_iter().find(|base| self.senses.contains_key(base)).unwrap_or_default()
    }
}

/// Phrases that mean the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Paraphrases {
    /// What a phrase (words joined by blanks) can be replaced by.
    of: HashMap<String, Vec<Box<str>>>,
    longest: usize,
}

/// Longest phrase of the table, in words.
const LONGEST_PHRASE: usize = 7;

impl Paraphrases {
    /// Reads those entries of which either phrase occurs in `sentences`. The file has groups of three lines:
    /// probability, phrase, paraphrase.
    fn read(file: &Path, sentences: &[Vec<String>]) -> Result<Self> {
        let runs = |words: &Vec<String>| -> Vec<String> {
            (1..=LONGEST_PHRASE).flat_map(|n| words.windows(n)).map(|run| run.join(" ")).collect()
        };
        let wanted: HashSet<Vec<u8>> = sentences.iter().flat_map(runs).map(String::into_bytes).collect();
        let reader = File::open(file).map_err(|e| Error::io(file, e))?;
        let mut reader = BufReader::with_capacity(1 << 16, flate2::read::MultiGzDecoder::new(reader));
        let mut found = Self::default();
        let (mut probability, mut phrase, mut other) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let mut whole = 0;
            for line in [&mut probability, &mut phrase, &mut other] {
                line.clear();
                let read = reader.read_until(b'\n', line).map_err(|e| Error::io(file, e))?;
                while line.last().is_some_and(u8::is_ascii_whitespace) {
                    line.pop();
                }
                whole += usize::from(read > 0);
            }
            match whole {
                0 => return Ok(found),
                3 => {}
                _ => return Err(Error::config(file, "the last entry is cut off", HINT)),
            }
            if wanted.contains(&phrase) || wanted.contains(&other) {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                found.longest = found.longest.max(text(&phrase).split(' ').count());
                found.of.entry(text(&phrase)).or_default().push(text(&other).into());
            }
        }
    }

    /// Tells of every phrase of `one` that has a paraphrase in `other`: start and length in `one`, then in `other`.
    pub(super) fn find(
        &self,
        one: &[String],
        other: &[String],
        mut tell: impl FnMut(usize, usize, usize, usize),
    ) {
        for start in 0..one.len() {
            for length in 1..=self.longest.min(one.len() - start) {
                let Some(paraphrases) = self.of.get(&one[start..start + length].join(" ")) else { continue };
                for paraphrase in paraphrases {
                    let words: Vec<&str> = paraphrase.split(' ').collect();
                    for (at, run) in other.windows(words.len()).enumerate() {
                        if run.iter().map(String::as_str).eq(words.iter().copied()) {
                            tell(start, length, at, words.len());
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_and_irregular_forms_have_the_senses_of_their_base() -> Result<()> {
        let synsets = "dog\n1 2\nhound\n2 7\ngoose\n9\n";
        let found = Synonyms::parse(synsets, "goose\ngeese\n", Path::new("x"))?;
        assert_eq!(found.senses("dogs"), [1, 2]);
        assert_eq!(found.senses("geese"), [9]);
        assert!(found.senses("grass").is_empty());
        assert!(Synonyms::parse("dog\nx\n", "", Path::new("x")).is_err());
        Ok(())
    }

    #[test]
    fn a_folder_without_tables_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = MeteorData::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains("no METEOR tables"), "{error}");
        std::fs::write(folder.path().join("meteor-1.5.jar"), "no archive").unwrap();
        assert!(MeteorData::open(folder.path()).unwrap_err().to_string().contains("not an archive"));
    }
}

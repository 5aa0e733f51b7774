//! Values with the place that they came from, for errors.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::Spanned;

use crate::error::{Error, Result};

/// Where a value came from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    Flag(&'static str),
    File { path: PathBuf, line: usize, column: usize },
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => write!(f, "--{name}"),
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A value with its origin.
pub(super) struct Sourced<T>(pub(super) T, pub(super) Origin);

impl<T> Sourced<T> {
    /// Checks the value; an error names the origin.
    pub(super) fn check<U>(self, check: impl FnOnce(T) -> Result<U>) -> Result<U> {
        check(self.0).map_err(|error| Error::Invalid(format!("{}: {error}", self.1)))
    }
}

/// The text of the file, to tell places in it.
pub(super) struct Source<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a str,
}

impl Source<'_> {
    pub(super) fn origin(&self, span: Range<usize>) -> Origin {
        let before = &self.text[..span.start.min(self.text.len())];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Origin::File {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    pub(super) fn value<T>(&self, spanned: Spanned<T>) -> Sourced<T> {
        let origin = self.origin(spanned.span());
        Sourced(spanned.into_inner(), origin)
    }
}

/// A list: the flags, or else what the file says.
pub(super) fn list<T: FromStr<Err = Error>>(
    flag: &'static str,
    flags: Vec<String>,
    in_file: Vec<Spanned<String>>,
    source: &Source<'_>,
) -> Result<Vec<T>> {
    let values: Vec<_> = if flags.is_empty() {
        in_file.into_iter().map(|value| source.value(value)).collect()
    } else {
        flags.into_iter().map(|value| Sourced(value, Origin::Flag(flag))).collect()
    };
    values.into_iter().map(|value| value.check(|text| text.parse())).collect()
}

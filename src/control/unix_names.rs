//! Users and groups by name.
//!
//! Read from `/etc/passwd` and `/etc/group` instead of asking the C library: name services may ask the
//! network, and control must not wait. A user of a directory service can be given by number.

use crate::error::{Error, Result};

/// Largest id that can be given: `u32::MAX` means "leave as it is" to chown(2).
const MAX_ID: u32 = u32::MAX - 1;

/// Number of the user `name` (a name, or a number).
pub fn user_id(name: &str) -> Result<u32> {
    resolve(name, "user", "/etc/passwd")
}

/// Number of the group `name` (a name, or a number).
pub fn group_id(name: &str) -> Result<u32> {
    resolve(name, "group", "/etc/group")
}

fn resolve(name: &str, kind: &str, file: &str) -> Result<u32> {
    if let Ok(id) = name.parse() {
        return if id <= MAX_ID {
            Ok(id)
        } else {
            Err(Error::Invalid(format!("{kind} {id} cannot exist: use 0 to {MAX_ID}")))
        };
    }
    let table = std::fs::read_to_string(file).map_err(Error::io(format!("reading {file}")))?;
    find(&table, name).ok_or_else(|| {
        Error::Invalid(format!(
            "no {kind} {name:?} in {file}: create it, or give the number of a {kind} known elsewhere"
        ))
    })
}

/// The third field of the line that starts with `name:`; passwd(5) and group(5) agree that far.
fn find(table: &str, name: &str) -> Option<u32> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        fields.nth(1)?.parse().ok().filter(|id| *id <= MAX_ID)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_for_themselves_and_names_are_looked_up() {
        assert_eq!(user_id("1234").unwrap(), 1234);
        assert_eq!(user_id("root").unwrap(), 0);
        assert_eq!(group_id("root").unwrap(), 0);
        assert_eq!(user_id("4294967295").unwrap_err().code(), "invalid");
        let error = group_id("no-such-group").unwrap_err();
        assert!(error.to_string().contains("/etc/group"), "{error}");
    }

    #[test]
    fn only_whole_names_match() {
        let table = "kvm:x:36:qemu\nkvm2:x:37:\nbroken\n:x:0:\nodd:x:many:\n";
        assert_eq!(find(table, "kvm"), Some(36));
        assert_eq!(find(table, "kvm2"), Some(37));
        assert_eq!(find(table, "kv"), None);
        assert_eq!(find(table, "odd"), None);
        assert_eq!(find(table, "broken"), None);
    }
}

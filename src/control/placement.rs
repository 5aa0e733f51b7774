//! Which poll cores a port's lanes run on.

use crate::error::{Error, Result};

/// Chooses cores. Pure: what is loaded is told to it.
#[derive(Debug)]
pub struct Placement<'a> {
    /// CPU of each poll core, by index.
    pub cpus: &'a [usize],
    /// Lanes on each poll core now, by index.
    pub lanes: &'a [usize],
}

impl Placement<'_> {
    /// Cores of (guest→VF, VF→guest), as indices. `asked` holds CPUs: none (the least loaded core takes
    /// both lanes, the first of equals), one (for both), or two.
    pub fn place(&self, asked: &[usize]) -> Result<(usize, usize)> {
        match asked {
            [] => {
                let least = (0..self.cpus.len()).min_by_key(|&core| self.lanes[core]);
                let core = least
                    .ok_or_else(|| Error::Exhausted("the daemon has no poll core: give it some with --cores".into()))?;
                Ok((core, core))
            }
            [both] => self.core(*both).map(|core| (core, core)),
            [guest_to_vf, vf_to_guest] => Ok((self.core(*guest_to_vf)?, self.core(*vf_to_guest)?)),
            more => Err(Error::Invalid(format!(
                "{} CPUs are named: a port has two directions, name one CPU for both or two",
                more.len()
            ))),
        }
    }

    fn core(&self, cpu: usize) -> Result<usize> {
        self.cpus.iter().position(|&c| c == cpu).ok_or_else(|| {
            Error::Invalid(format!(
                "CPU {cpu} is not a poll core of this daemon, which has {:?}: choose among them, or start it with --cores",
                self.cpus
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_loaded_core_or_the_cores_asked_for() {
        let place = |lanes: &[usize], asked: &[usize]| {
            let cpus = [3, 5, 7];
            Placement { cpus: &cpus, lanes }.place(asked).map_err(|e| e.code())
        };
        for (lanes, asked, expected) in [
            ([0, 0, 0], &[][..], Ok((0, 0))),
            ([2, 0, 0], &[], Ok((1, 1))),
            ([2, 3, 1], &[], Ok((2, 2))),
            ([9, 0, 0], &[3], Ok((0, 0))),
            ([9, 0, 0], &[7, 5], Ok((2, 1))),
            ([0, 0, 0], &[4], Err("invalid")),
            ([0, 0, 0], &[3, 4], Err("invalid")),
            ([0, 0, 0], &[3, 5, 7], Err("invalid")),
        ] {
            assert_eq!(place(&lanes, asked), expected, "{lanes:?} {asked:?}");
        }
        let nobody = Placement { cpus: &[], lanes: &[] };
        assert_eq!(nobody.place(&[]).unwrap_err().code(), "exhausted");
    }
}

//! Which poll cores a port's lanes run on.

use crate::error::{Error, Result};

/// The cores of a port's lanes, by number: (guest→VF, VF→guest), as indices.
pub type Cores = Vec<(usize, usize)>;

/// Chooses cores. Pure: what is loaded is told to it.
#[derive(Debug)]
pub struct Placement<'a> {
    /// CPU of each poll core, by index.
    pub cpus: &'a [usize],
    /// Lanes on each poll core now, by index.
    pub lanes: &'a [usize],
    /// Of these, those that are the first of their port, which have most to do: many a guest uses one queue pair.
    pub first: &'a [usize],
}

impl Placement<'_> {
    /// Cores for a port with so many queue pairs. `asked` holds CPUs: one (for everything), or as many for guest→VF and
    /// then for VF→guest, one for each lane. None: `now` stays, with as many as there are pairs and cores; the least
    /// loaded are added, each with one lane of either direction.
    pub fn place(&self, asked: &[usize], pairs: usize, now: &[(usize, usize)]) -> Result<Cores> {
        let half = asked.len().div_ceil(2);
        match asked {
            [] => self.choose(pairs, now),
            [all] => self.core(*all).map(|core| vec![(core, core)]),
            odd if odd.len() % 2 == 1 => Err(Error::Invalid(format!(
                "{} CPUs are named: name one for everything, or as many for guest to VF as, behind them, for VF to guest",
                odd.len()
            ))),
            _ if half > pairs => Err(Error::Invalid(format!(
                "{half} CPUs are named for each direction of a port with {pairs} queue pairs: a lane has at least one \
                 pair, name at most {pairs} of them, or ask for more queue pairs"
            ))),
            halves => {
                let (guest_to_vf, vf_to_guest) = halves.split_at(half);
                for direction in [guest_to_vf, vf_to_guest] {
                    let twice = direction.iter().enumerate().find(|(at, cpu)| direction[..*at].contains(cpu));
                    if let Some((_, cpu)) = twice {
                        return Err(Error::Invalid(format!(
                            "CPU {cpu} is named twice for one direction: name it once"
                        )));
                    }
                }
                guest_to_vf.iter().zip(vf_to_guest).map(|(a, b)| Ok((self.core(*a)?, self.core(*b)?))).collect()
            }
        }
    }

    fn choose(&self, pairs: usize, now: &[(usize, usize)]) -> Result<Cores> {
        let mut cores: Cores = now.iter().copied().take(pairs).collect();
        let taken = |core: &usize| now.iter().any(|(a, b)| a == core || b == core);
        let mut others: Vec<usize> = (0..self.cpus.len()).filter(|core| !taken(core)).collect();
        others.sort_by_key(|&core| (self.lanes[core], self.first[core]));
        let missing = pairs.saturating_sub(cores.len());
        cores.extend(others.into_iter().take(missing).map(|core| (core, core)));
        if cores.is_empty() {
            return Err(Error::Exhausted("the daemon has no poll core: give it some with --cores".into()));
        }
        Ok(cores)
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
    fn the_least_loaded_cores_or_those_asked_for() {
        let place = |lanes: &[usize], asked: &[usize], pairs| {
            let cpus = [3, 5, 7];
            Placement { cpus: &cpus, lanes, first: &[1, 0, 0] }.place(asked, pairs, &[]).map_err(|e| e.code())
        };
        let both = |cores: &[usize]| Ok(cores.iter().map(|core| (*core, *core)).collect());
        for (lanes, asked, pairs, expected) in [
            ([0, 0, 0], &[][..], 1, both(&[1])),
            ([0, 2, 2], &[], 1, both(&[0])),
            ([2, 3, 1], &[], 1, both(&[2])),
            ([2, 3, 1], &[], 2, both(&[2, 0])),
            // Of equals the one with fewer first lanes.
            ([2, 2, 2], &[], 2, both(&[1, 2])),
            ([2, 2, 2], &[], 4, both(&[1, 2, 0])),
            ([9, 0, 0], &[3], 4, both(&[0])),
            ([9, 0, 0], &[7, 5], 1, Ok(vec![(2, 1)])),
            ([9, 0, 0], &[7, 5, 7, 5], 2, both(&[2, 1])),
            ([9, 0, 0], &[7, 5, 3, 5], 4, Ok(vec![(2, 0), (1, 1)])),
            ([0, 0, 0], &[4], 1, Err("invalid")),
            ([0, 0, 0], &[3, 4], 1, Err("invalid")),
            ([0, 0, 0], &[3, 5, 7], 3, Err("invalid")),
            ([0, 0, 0], &[3, 5, 7, 5], 1, Err("invalid")),
            ([0, 0, 0], &[3, 3, 5, 7], 2, Err("invalid")),
            ([0, 0, 0], &[3, 5, 7, 7], 2, Err("invalid")),
        ] {
            assert_eq!(place(&lanes, asked, pairs), expected, "{lanes:?} {asked:?} {pairs}");
        }
        let nobody = Placement { cpus: &[], lanes: &[], first: &[] };
        assert_eq!(nobody.place(&[], 1, &[]).unwrap_err().code(), "exhausted");
    }

    #[test]
    fn lanes_stay_where_they_are_when_there_are_more_or_fewer() {
        let place = |pairs, now: &[(usize, usize)]| {
            let placement = Placement { cpus: &[3, 5, 7, 9], lanes: &[9, 2, 1, 9], first: &[0; 4] };
            placement.place(&[], pairs, now).unwrap()
        };
        assert_eq!(place(1, &[(3, 0)]), [(3, 0)]);
        assert_eq!(place(3, &[(3, 0)]), [(3, 0), (2, 2), (1, 1)]);
        assert_eq!(place(1, &[(3, 0), (2, 2)]), [(3, 0)]);
    }
}

//! A site of pretended machines that several orchestrators share: slow and lying when told so, and the one that knows who was given what.

use async_trait::async_trait;
use fastrand::Rng;
use mayfly_api::agent::Bootstrap;
use mayfly_api::{Absence, DesktopName, SessionId};
use mayfly_orchestrator::provider::simulated::Simulated;
use mayfly_orchestrator::provider::{
    AgentChannel, Check, DesktopSpec, MachineState, Provider, ProviderError, Section,
};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::sleep;

/// How the site is. At first it is quick and honest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mood {
    /// Every call waits for up to so many milliseconds before and after its effect.
    pub(super) slow_ms: u64,
    /// So many calls of a hundred are not what they are answered to be.
    pub(super) lies: u8,
}

/// What a call that is not honest does.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// It fails, and has no effect.
    Refused,
    /// It has its effect, and its answer is lost.
    Lost,
    /// Its answer is that it failed; the effect comes some seconds later.
    Late,
    /// It says what is not so: a removal that was not done, a machine that is not there, a list without some.
    False,
}

/// See the module.
pub(super) struct Site {
    machines: Simulated,
    known: Mutex<Known>,
}

struct Known {
    random: Rng,
    mood: Mood,
    /// For which session each machine was asked for, and by whom.
    made: HashMap<DesktopName, (SessionId, usize)>,
    /// To which session each was given.
    given: HashMap<SessionId, Vec<DesktopName>>,
    /// Those whose removal was answered for.
    removed: HashSet<DesktopName>,
    calls: u64,
    lies: BTreeMap<String, u32>,
    wrong: Vec<String>,
}

impl Site {
    pub(super) fn new(machines: Simulated, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            machines,
            known: Mutex::new(Known {
                random: Rng::with_seed(seed),
                mood: Mood::default(),
                made: HashMap::new(),
                given: HashMap::new(),
                removed: HashSet::new(),
                calls: 0,
                lies: BTreeMap::new(),
                wrong: Vec::new(),
            }),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it is like that.
    pub(super) fn turn(&self, mood: Mood) {
        self.known().mood = mood;
    }

    /// Every machine that there is.
    pub(super) async fn machines(&self) -> Result<Vec<DesktopName>, ProviderError> {
        self.machines.list().await
    }

    /// Calls, and how many lies of each kind.
    pub(super) fn told(&self) -> (u64, BTreeMap<String, u32>) {
        let known = self.known();
        (known.calls, known.lies.clone())
    }

    /// What must never have happened.
    pub(super) fn wrong(&self) -> Vec<String> {
        self.known().wrong.clone()
    }

    /// Waits as the mood wants it; whether the call is to be a lie, one of these.
    async fn call(&self, what: &str, lies: &[Lie]) -> Option<Lie> {
        let (pause, lie) = {
            let known = &mut *self.known();
            known.calls += 1;
            let lie = known.random.u8(0..100) < known.mood.lies;
            let lie = lie.then(|| known.random.choice(lies)).flatten().copied();
            if let Some(lie) = lie {
                *known.lies.entry(format!("{what}: {lie:?}")).or_default() += 1;
            }
            (known.random.u64(0..=known.mood.slow_ms), lie)
        };
        sleep(Duration::from_millis(pause)).await;
        lie
    }

    async fn pause(&self) {
        let pause = {
            let known = &mut *self.known();
            known.random.u64(0..=known.mood.slow_ms)
        };
        sleep(Duration::from_millis(pause)).await;
    }

    async fn is_there(&self, name: DesktopName) -> bool {
        !matches!(self.machines.state(name).await, Ok(MachineState::Absent))
    }
}

fn lost<T>() -> Result<T, ProviderError> {
    Err(ProviderError::Failed(
        "the pretended site did not answer in time".to_owned(),
    ))
}

/// The site as one of the orchestrators sees it.
pub(super) struct Door {
    pub(super) site: Arc<Site>,
    /// Which orchestrator.
    pub(super) of: usize,
}

#[async_trait]
impl Provider for Door {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    async fn preflight(&self) -> Vec<Check> {
        self.site.machines.preflight().await
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        {
            let known = &mut *self.site.known();
            let (name, of) = (spec.name, self.of);
            if known.removed.contains(&name) {
                let why = format!("orchestrator {of} makes {name}, which was removed before");
                known.wrong.push(why);
            }
            if let Some((session, by)) = known.made.insert(name, (spec.session, of)) {
                let why = format!(
                    "{name} is made twice: by {by} for {session}, by {of} for {}",
                    spec.session
                );
                known.wrong.push(why);
            }
        }
        let lies = [Lie::Refused, Lie::Lost, Lie::Late];
        match self.site.call("create", &lies).await {
            Some(Lie::Refused) => return lost(),
            Some(Lie::Late) => {
                let (site, spec) = (self.site.clone(), spec.clone());
                let late = site.known().random.u64(500..8_000);
                tokio::spawn(async move {
                    sleep(Duration::from_millis(late)).await;
                    // Whoever asked is told nothing any more.
                    let _ = site.machines.create(&spec).await;
                });
                return lost();
            }
            lie => {
                self.site.machines.create(spec).await?;
                if lie.is_some() {
                    return lost();
                }
            }
        }
        self.site.pause().await;
        Ok(())
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        // Each machine is looked at again and again: one false word ends it.
        let lies = [&[Lie::Refused; 29][..], &[Lie::False]].concat();
        match self.site.call("state", &lies).await {
            Some(Lie::False) => Ok(MachineState::Absent),
            Some(_) => lost(),
            None => self.site.machines.state(name).await,
        }
    }

    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError> {
        let session = bootstrap.session;
        let others = {
            let known = &mut *self.site.known();
            let of = self.of;
            if let Some((made_for, _)) = known.made.get(&name)
                && *made_for != session
            {
                let why = format!("{of} gives {name}, made for {made_for}, to {session}");
                known.wrong.push(why);
            }
            let given = known.given.entry(session).or_default();
            if !given.contains(&name) {
                given.push(name);
            }
            let removed = &known.removed;
            let others = given.iter().filter(|n| **n != name && !removed.contains(n));
            others.copied().collect::<Vec<_>>()
        };
        for other in others {
            if self.site.is_there(other).await {
                let why = format!("{session} is given {name} while it has {other}");
                self.site.known().wrong.push(why);
            }
        }
        match self
            .site
            .call("bootstrap", &[Lie::Refused, Lie::Lost])
            .await
        {
            Some(Lie::Refused) => Err(ProviderError::NotYet("it boots".to_owned())),
            lie => {
                self.site.machines.bootstrap(name, bootstrap).await?;
                match lie {
                    Some(_) => Err(ProviderError::NotYet("it boots".to_owned())),
                    None => Ok(()),
                }
            }
        }
    }

    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError> {
        match self.site.call("agent", &[Lie::Refused]).await {
            Some(_) => lost(),
            None => self.site.machines.agent(name).await,
        }
    }

    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        self.site.machines.rdp_address(name).await
    }

    async fn last_words(&self, name: DesktopName) -> Vec<Section> {
        self.site.machines.last_words(name).await
    }

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        let lies = [Lie::Refused, Lie::Lost, Lie::False];
        let lie = self.site.call("destroy", &lies).await;
        let checked = match lie {
            Some(Lie::Refused) => return lost(),
            Some(Lie::False) => Vec::new(),
            _ => self.site.machines.destroy(name).await?,
        };
        self.site.pause().await;
        if matches!(lie, Some(Lie::Lost)) {
            return lost();
        }
        self.site.known().removed.insert(name);
        Ok(checked)
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        let lie = self.site.call("list", &[Lie::Refused, Lie::False]).await;
        let mut all = self.site.machines.list().await?;
        match lie {
            None => {}
            Some(Lie::False) => {
                let known = &mut *self.site.known();
                all.retain(|_| known.random.bool());
            }
            Some(_) => return lost(),
        }
        // What is told was so some time ago.
        self.site.pause().await;
        Ok(all)
    }
}

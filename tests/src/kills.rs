//! Kill points of a site: who dies at which step of a create or a destroy.
//!
//! The steps are those of the provider `terraform`, as they show from outside: in its folder, in `/proc`, on the site. Whoever dies,
//! the session ends, and nothing of its desktop is left.

use crate::lab::{Lab, Orchestrator, until};
use crate::sessions::{END, Held, READY};
use crate::site::{self, Site};
use anyhow::{Context, Result, ensure};
use mayfly_api::SessionPhase;
use serde_json::{Value, json};
use std::fs;

/// Who dies, by SIGKILL or by a loss of power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// Terraform alone: its provider goes on for a while.
    Terraform,
    /// The one that holds Terraform, which goes on.
    Supervisor,
    /// The orchestrator.
    Orchestrator,
    /// Proxmox VE, and every machine on it.
    Site,
}

/// How far the create or the destroy is. The destroy is that of a desktop whose run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// It has its folder, and the module is being initialised.
    Prepared,
    /// Its run has begun.
    Began,
    /// There is a machine.
    Cloned,
    /// That runs.
    Booted,
    /// Its end was asked for: the run is being ended.
    Cancelled,
    /// Its machine does not run any more.
    Stopped,
    /// There is no machine any more, but its records.
    Removed,
}

const VICTIMS: [Victim; 4] = [
    Victim::Terraform,
    Victim::Supervisor,
    Victim::Orchestrator,
    Victim::Site,
];
const STEPS: [Step; 7] = [
    Step::Prepared,
    Step::Began,
    Step::Cloned,
    Step::Booted,
    Step::Cancelled,
    Step::Stopped,
    Step::Removed,
];

/// Every victim at every step at which it is there.
pub fn all() -> impl Iterator<Item = (Victim, Step)> {
    let pairs = VICTIMS.into_iter().flat_map(|v| STEPS.map(|s| (v, s)));
    pairs.filter(|(victim, step)| {
        let of_the_run = matches!(victim, Victim::Terraform | Victim::Supervisor);
        !of_the_run || (Step::Began..=Step::Cancelled).contains(step)
    })
}

/// What a site needs to be a victim, and for its steps to last long enough to be met.
#[must_use]
pub fn changes() -> Value {
    json!({"keep_state": true, "delays": {"allocate": 2, "qmdestroy": 1}})
}

/// A site with an orchestrator.
#[derive(Debug)]
pub struct Scene<'a> {
    /// The site, made with [`changes`].
    pub site: &'a mut Site,
    /// Where the orchestrator is.
    pub lab: &'a Lab,
    /// The orchestrator.
    pub orchestrator: &'a mut Orchestrator,
}

impl Scene<'_> {
    /// Asks for a desktop, kills `victim` at `step`, and sees that the session ends and nothing is left.
    ///
    /// # Errors
    /// When the step is never met, or something is left.
    pub async fn kill(&mut self, victim: Victim, step: Step) -> Result<()> {
        let killed = self.killed(victim, step).await;
        killed.with_context(|| format!("{victim:?} killed at {step:?}"))
    }

    async fn killed(&mut self, victim: Victim, step: Step) -> Result<()> {
        if step == Step::Prepared {
            self.forget_module()?;
        }
        let held = Held::create(self.orchestrator).await?;
        self.meet(step.min(Step::Booted)).await?;
        if step > Step::Booted {
            let client = self.orchestrator.client();
            client.destroy(held.id, &held.secret).await?;
            self.meet(step).await?;
        }
        match victim {
            Victim::Terraform => kill_all(&site::applying(self.lab)?)?,
            Victim::Supervisor => kill_all(&site::supervising(self.lab)?)?,
            Victim::Orchestrator => {
                self.orchestrator.crash().await?;
                self.orchestrator.start_again(self.lab).await?;
            }
            Victim::Site => self.site.loses_power()?,
        }
        if (victim, step) == (Victim::Site, Step::Cloned) {
            // Only root may: docs/proxmox.md tells the administrator.
            for machine in self.site.machines()? {
                self.site.order(&json!({"do": ["unlock", machine.vmid]}))?;
            }
        }
        let word = match victim {
            Victim::Terraform => "SIGKILL",
            Victim::Supervisor => "its supervisor was killed",
            Victim::Orchestrator | Victim::Site => "",
        };
        if step > Step::Booted || word.is_empty() {
            held.destroyed(self.orchestrator).await?;
        } else {
            let ended = held.ended(self.orchestrator).await?;
            ensure!(ended.phase == SessionPhase::Failed, "{ended:?}");
            let said = ended.failure.context("a reason")?.problem.detail;
            ensure!(said.contains(word), "{said}");
        }
        if step == Step::Prepared {
            // Its starter may be dead. It makes nothing.
            until("the module is initialised", END, async || {
                Ok(self.lab.running("tofu")?.is_empty().then_some(()))
            })
            .await?;
        }
        self.site.nothing_is_left(self.lab).await
    }

    async fn meet(&mut self, step: Step) -> Result<()> {
        until(&format!("it is {step:?}"), READY, async || {
            Ok(self.is_met(step)?.then_some(()))
        })
        .await
    }

    fn is_met(&mut self, step: Step) -> Result<bool> {
        let machines = self.site.machines()?;
        Ok(match step {
            Step::Prepared => !self.folders("desktop-")?.is_empty(),
            Step::Began => !site::applying(self.lab)?.is_empty(),
            Step::Cloned => !machines.is_empty(),
            Step::Booted => machines.iter().any(|m| m.running),
            Step::Cancelled => true,
            Step::Stopped => !machines.is_empty() && machines.iter().all(|m| !m.running),
            Step::Removed => machines.is_empty() && !self.folders("desktop-")?.is_empty(),
        })
    }

    /// Folders of the provider whose name begins so.
    fn folders(&self, with: &str) -> Result<Vec<std::path::PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.lab.path("state/terraform"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(with) {
                found.push(entry.path());
            }
        }
        Ok(found)
    }

    /// The next run waits for it to be initialised.
    fn forget_module(&self) -> Result<()> {
        for folder in self.folders("module-")? {
            fs::remove_dir_all(folder)?;
        }
        Ok(())
    }

    /// Starts the orchestrator once more, waits until its reaper looked twice, and sees that nothing is there, nor came back.
    ///
    /// # Errors
    /// When something is left.
    pub async fn end(&mut self) -> Result<()> {
        self.orchestrator.crash().await?;
        self.site.reaped(self.lab, self.orchestrator).await?;
        let parts = self.folders("part-")?;
        ensure!(parts.is_empty(), "{parts:?}");
        self.site.nothing_is_left(self.lab).await
    }
}

fn kill_all(processes: &[u32]) -> Result<()> {
    ensure!(!processes.is_empty(), "there is nobody to kill");
    processes.iter().try_for_each(|pid| site::kill(*pid))
}

//! Desktops made by Terraform on a site (`site.rs`: an imitation of the Proxmox VE API with real, emulated machines behind it), with
//! the micro guest as template. Tools, provider, supervisors, agents and their line are the real ones.
//!
//! Every test has a network of its own, and ends with nothing left: asked of the lab, of `/proc`, and of the database.

#[path = "proxmox/replicas.rs"]
mod replicas;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use mayfly_api::agent::Call;
use mayfly_api::{
    CreateSession, DesktopName, EndReason, SessionId, SessionPhase, Setback, StageName,
    StageProgress,
};
use mayfly_orchestrator::agents::{Agents, AgentsConfig, Callers};
use mayfly_orchestrator::config::Config;
use mayfly_orchestrator::domain::{self, DomainConfig, Member};
use mayfly_orchestrator::http::terraform::{Backend, router};
use mayfly_orchestrator::provider::conformance::{self, World};
use mayfly_orchestrator::provider::terraform::{self, Parts, STEPS, Terraform};
use mayfly_orchestrator::provider::{CheckStatus, DesktopSpec, Provider, ProviderError, Steps};
use mayfly_orchestrator::pve::preflight::{self, Rest, Wanted};
use mayfly_orchestrator::secret::Secrets;
use mayfly_orchestrator::store::Store;
use mayfly_orchestrator::store::machines::Machines;
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_tests::deaths::{self, Life, Place};
use mayfly_tests::kills::{self, Scene, Step, Victim};
use mayfly_tests::lab::{self, Lab, Orchestrator, image_folder, program, until};
use mayfly_tests::realm::{Cable, Realm};
use mayfly_tests::sessions::{END, Held, READY};
use mayfly_tests::site::{
    self, AGENTS, FIRST_VM_ID, Site, TEMPLATE, TOKEN, alone, applying, firewall_is_as_documented,
    kill,
};
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is told of a desktop that nothing holds up.
const MADE: [StageProgress; 2] = [StageProgress::Cloning, StageProgress::WaitingForAddress];

/// A site, and an orchestrator with a template on it.
struct Here {
    site: Site,
    lab: Lab,
    orchestrator: Orchestrator,
}

impl Here {
    async fn start(name: &str, limits: &str, changes: Value) -> Result<Self> {
        let site = Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, changes)?;
        let sections = site.configuration()?;
        Self::with(site, name, limits, sections).await
    }

    /// With this after the first keys of the template.
    async fn with(site: Site, name: &str, limits: &str, sections: String) -> Result<Self> {
        let lab = Lab::new(name)?;
        let provider = lab::Provider::Terraform(sections);
        // Nobody beats for a session here, and making a desktop takes long on a busy machine.
        let limits = format!("lease_s = 1800\n{limits}");
        let orchestrator = Orchestrator::start(&lab, &provider, &limits).await?;
        Ok(Self {
            site,
            lab,
            orchestrator,
        })
    }

    /// Waits until one more removal has failed than `before`.
    async fn a_removal_fails(&mut self, before: usize) -> Result<()> {
        until("a removal fails", END, async || {
            Ok((self.failed_removals() > before).then_some(()))
        })
        .await
    }

    fn failed_removals(&mut self) -> usize {
        let log = self.orchestrator.process().output();
        log.matches("not removed; trying again").count()
    }

    /// What the session's events said of its stages, each word once.
    async fn told(&self, held: &Held) -> Result<Vec<StageProgress>> {
        let store = SqliteStore::open_to_read(&self.lab.path("state/mayfly.db")).await?;
        let events = store.events_after(held.id, 0).await?;
        store.close().await;
        let mut told: Vec<_> = events
            .iter()
            .filter_map(|e| e.session.stages.last()?.progress.clone())
            .collect();
        told.dedup();
        Ok(told)
    }

    async fn nothing_is_left(&mut self) -> Result<()> {
        self.site.nothing_is_left(&self.lab).await
    }
}

fn number(name: DesktopName) -> u32 {
    FIRST_VM_ID + name.number()
}

#[test]
fn a_desktop_is_made_used_and_gone() -> Result<()> {
    alone("a_desktop_is_made_used_and_gone", async || {
        let mut here = Here::start("proxmox life", "idle_s = 3", json!({})).await?;
        let held = Held::create(&here.orchestrator).await?;
        let session = held.ready(&here.orchestrator).await?;
        let stages: Vec<StageName> = session.stages.iter().map(|s| s.name).collect();
        assert_eq!(stages, StageName::CREATE);
        assert_eq!(here.told(&held).await?, MADE);
        let name = session.desktop.context("a desktop")?;
        let machines = here.site.machines()?;
        assert_eq!(machines.len(), 1, "{machines:?}");
        assert_eq!(
            (machines[0].vmid, machines[0].name.clone()),
            (number(name), Some(name.to_string()))
        );
        let rdp = session.rdp.context("an address")?;
        assert!(rdp.address.to_string().starts_with("10.85.0."), "{rdp:?}");

        let caller = held.call(&here.orchestrator).await?;
        held.until(&here.orchestrator, "the connection is seen", END, |s| {
            s.phase == SessionPhase::Connected
        })
        .await?;
        // An administrator moves it while it is in use: it is found where it is now.
        let elsewhere = if machines[0].node.as_deref() == Some("pve2") {
            "pve3"
        } else {
            "pve2"
        };
        here.site
            .order(&json!({"do": ["migrate", machines[0].vmid, elsewhere, 0]}))?;
        drop(caller);
        let ended = held.ended(&here.orchestrator).await?;
        assert_eq!(
            (ended.phase, ended.end_reason),
            (SessionPhase::Ended, Some(EndReason::Idle))
        );
        here.nothing_is_left().await?;
        no_secret_was_told(&here.lab, &held)
    })
}

/// The token's secret and the session's are in no log, and in no file of the state but the key and the database's ciphers.
fn no_secret_was_told(lab: &Lab, held: &Held) -> Result<()> {
    use secrecy::ExposeSecret as _;
    let mut searched = 0;
    for folder in ["log", "state", "config", "tmp"] {
        search(&lab.path(folder), &mut |path, text| {
            searched += 1;
            for secret in [TOKEN.1, held.secret.expose_secret()] {
                ensure!(!text.contains(secret), "a secret is in {}", path.display());
            }
            Ok(())
        })?;
    }
    ensure!(searched > 2, "nothing was searched");
    Ok(())
}

fn search(folder: &Path, look: &mut dyn FnMut(&Path, &str) -> Result<()>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            search(&path, look)?;
        } else if path.is_file() {
            look(&path, &String::from_utf8_lossy(&std::fs::read(&path)?))?;
        }
    }
    Ok(())
}

#[test]
fn three_at_once_are_spread_and_share_nothing() -> Result<()> {
    alone("three_at_once_are_spread_and_share_nothing", async || {
        let mut here = Here::start(
            "proxmox three",
            "concurrent_creates = 3",
            // A storage that takes its time: the clones wait for one another.
            json!({"delays": {"allocate": 1}}),
        )
        .await?;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(Held::create(&here.orchestrator).await?);
        }
        let mut addresses = Vec::new();
        for one in &held {
            let session = one.ready(&here.orchestrator).await?;
            addresses.push(session.rdp.context("an address")?.address);
        }
        let mut waited = 0;
        for one in &held {
            let told = here.told(one).await?;
            ensure!(told.ends_with(&MADE), "{told:?}");
            waited += u32::from(told[0] == StageProgress::WaitingForStorage { place: 1 });
        }
        assert_eq!(waited, 1, "two are cloned at a time");
        they_do_not_reach_each_other(&mut here, &addresses).await?;
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), 3);
        let mut nodes: Vec<_> = here
            .site
            .machines()?
            .into_iter()
            .filter_map(|m| m.node)
            .collect();
        nodes.sort_unstable();
        assert_eq!(nodes, ["pve1", "pve2", "pve3"]);
        let clones = here.site.order(&json!({"get": ["pve", "most_clones"]}))?;
        ensure!(
            clones == 1 || clones == 2,
            "{clones} clones at once, and 2 is the limit"
        );
        for one in &held {
            one.destroyed(&here.orchestrator).await?;
        }
        here.nothing_is_left().await
    })
}

/// By the firewall that the clones brought along: without it they do.
async fn they_do_not_reach_each_other(here: &mut Here, addresses: &[SocketAddr]) -> Result<()> {
    let machine = here
        .site
        .machines()?
        .into_iter()
        .min_by_key(|m| m.vmid)
        .context("a machine")?;
    // Its own address among them: that answers, so the program works.
    let reached = |here: &mut Here| -> Result<Vec<IpAddr>> {
        let mut list = Vec::new();
        for ip in addresses.iter().map(SocketAddr::ip) {
            let line = format!("ping -c 1 -W 2 {ip} >/dev/null && echo yes || echo no");
            if here.site.shell(machine.vmid, &line)?.trim() == "yes" {
                list.push(ip);
            }
        }
        Ok(list)
    };
    let list = reached(here)?;
    ensure!(list.len() == 1, "it reaches {list:?}, itself among them");
    here.site.without_firewall()?;
    until("it reaches all without the firewall", READY, async || {
        Ok((reached(here)?.len() == addresses.len()).then_some(()))
    })
    .await
}

#[test]
fn a_desktop_s_firewall_lets_flow_what_the_documentation_lists_and_nothing_else() -> Result<()> {
    alone(
        "a_desktop_s_firewall_lets_flow_what_the_documentation_lists_and_nothing_else",
        async || firewall_is_as_documented(),
    )
}

#[test]
fn a_cancel_in_each_stage_leaves_nothing() -> Result<()> {
    alone("a_cancel_in_each_stage_leaves_nothing", async || {
        let mut here = Here::start("proxmox cancel", "", json!({})).await?;
        for stage in StageName::CREATE {
            let held = Held::create(&here.orchestrator).await?;
            held.reach(&here.orchestrator, stage).await?;
            let ended = held.destroyed(&here.orchestrator).await?;
            assert_eq!(ended.phase, SessionPhase::Ended, "{stage:?}");
            here.nothing_is_left()
                .await
                .with_context(|| format!("cancelled in {stage:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn an_orchestrator_killed_while_terraform_runs_takes_up_the_run() -> Result<()> {
    alone(
        "an_orchestrator_killed_while_terraform_runs_takes_up_the_run",
        async || {
            let mut here =
                Here::start("proxmox adopt", "", json!({"delays": {"agent": 3}})).await?;
            let held = Held::create(&here.orchestrator).await?;
            until("Terraform runs", READY, async || {
                Ok((!applying(&here.lab)?.is_empty()).then_some(()))
            })
            .await?;
            let before = held.get(&here.orchestrator).await?.desktop;
            here.orchestrator.crash().await?;
            ensure!(
                !applying(&here.lab)?.is_empty(),
                "it went with its orchestrator"
            );
            here.orchestrator.start_again(&here.lab).await?;
            let session = held.ready(&here.orchestrator).await?;
            assert_eq!(session.desktop, before, "the same desktop");
            assert_eq!(here.told(&held).await?[0], StageProgress::Cloning);
            here.orchestrator
                .client()
                .destroy(held.id, &held.secret)
                .await?;
            here.orchestrator.crash().await?;
            here.orchestrator.start_again(&here.lab).await?;
            held.ended(&here.orchestrator).await?;
            here.nothing_is_left().await
        },
    )
}

#[test]
fn a_terraform_that_is_killed_is_told_and_nothing_is_left() -> Result<()> {
    alone(
        "a_terraform_that_is_killed_is_told_and_nothing_is_left",
        async || {
            let mut here = Here::start("proxmox kill", "", json!({})).await?;
            // Before there is a machine, while it is cloned, while it boots.
            for wanted in ["run", "machine", "boot"] {
                let held = Held::create(&here.orchestrator).await?;
                until(wanted, READY, async || {
                    let machines = here.site.machines()?;
                    let running = applying(&here.lab)?;
                    Ok(match wanted {
                        "run" => !running.is_empty(),
                        "machine" => !machines.is_empty(),
                        _ => machines.iter().any(|m| m.running),
                    }
                    .then_some(()))
                })
                .await?;
                // Alone: its provider goes on for a while, and what it made is in no state.
                for pid in applying(&here.lab)? {
                    kill(pid)?;
                }
                let ended = held.ended(&here.orchestrator).await?;
                assert_eq!(ended.phase, SessionPhase::Failed, "{wanted}: {ended:?}");
                let failure = ended.failure.context("a reason")?;
                ensure!(
                    failure.problem.detail.contains("SIGKILL"),
                    "{wanted}: {failure:?}"
                );
                if wanted == "boot" {
                    let words = here.orchestrator.logs(&here.lab, held.id)?;
                    for part in [
                        "==== terraform ====\n",
                        "==== proxmox tasks ====\n",
                        " qmstart by ",
                        "==== journal ====\n",
                    ] {
                        ensure!(words.contains(part), "{part:?} in {words}");
                    }
                }
                here.nothing_is_left()
                    .await
                    .with_context(|| format!("killed at {wanted:?}"))?;
            }
            Ok(())
        },
    )
}

#[test]
fn a_removal_waits_for_a_cluster_that_is_down_and_for_a_node_that_is_offline() -> Result<()> {
    alone(
        "a_removal_waits_for_a_cluster_that_is_down_and_for_a_node_that_is_offline",
        async || {
            let mut here = Here::start("proxmox down", "", json!({})).await?;
            for offline in [false, true] {
                let held = Held::create(&here.orchestrator).await?;
                held.ready(&here.orchestrator).await?;
                let node = here.site.machines()?[0].node.clone();
                if offline {
                    here.site
                        .order(&json!({"do": ["set_node_offline", node]}))?;
                } else {
                    here.site.order(&json!({"do": ["unreachable", 15]}))?;
                }
                let before = here.failed_removals();
                here.orchestrator
                    .client()
                    .destroy(held.id, &held.secret)
                    .await?;
                here.a_removal_fails(before).await?;
                let session = held.get(&here.orchestrator).await?;
                assert_eq!(
                    session.phase,
                    SessionPhase::Ending,
                    "nothing is believed gone"
                );
                if offline {
                    here.site
                        .order(&json!({"do": ["set_node_offline", node, false]}))?;
                }
                held.ended(&here.orchestrator).await?;
                here.nothing_is_left().await?;
            }
            Ok(())
        },
    )
}

/// What the tests above and the conformance suite do not show. All victims at all steps: `cargo xtask soak`.
#[test]
fn whoever_is_killed_while_a_desktop_is_made_or_removed_nothing_is_left() -> Result<()> {
    alone(
        "whoever_is_killed_while_a_desktop_is_made_or_removed_nothing_is_left",
        async || {
            let mut here = Here::start("proxmox kills", "", kills::changes()).await?;
            let mut scene = Scene {
                site: &mut here.site,
                lab: &here.lab,
                orchestrator: &mut here.orchestrator,
            };
            for (victim, step) in [
                (Victim::Orchestrator, Step::Prepared),
                (Victim::Site, Step::Began),
                (Victim::Supervisor, Step::Cloned),
                (Victim::Orchestrator, Step::Cloned),
                (Victim::Terraform, Step::Cancelled),
                (Victim::Orchestrator, Step::Cancelled),
                (Victim::Orchestrator, Step::Removed),
                (Victim::Site, Step::Removed),
            ] {
                scene.kill(victim, step).await?;
            }
            scene.end().await
        },
    )
}

/// Others for each commit; all of them: `cargo xtask soak`.
#[test]
fn killed_at_some_points_an_orchestrator_converges() -> Result<()> {
    alone(
        "killed_at_some_points_an_orchestrator_converges",
        async || {
            let site = Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, json!({}))?;
            let mut place = Place::on_a_site("proxmox deaths", site, None).await?;
            let points = deaths::points(&mut place, Life::Used).await?;
            ensure!(
                points.contains(&"after start tofu#1".to_owned()),
                "{points:?}"
            );
            // The soak has all of them. The module is prepared once for each state folder: `init` is no point of a later life.
            for point in ["after create: run started#1", "before list#2"] {
                let death = deaths::at(&mut place, Life::Used, point.to_owned()).await;
                deaths::nothing_was_left(&[death])?;
            }
            Ok(())
        },
    )
}

#[test]
fn a_machine_that_is_frozen_is_removed() -> Result<()> {
    alone("a_machine_that_is_frozen_is_removed", async || {
        let mut here = Here::start("proxmox frozen", "", json!({})).await?;
        let held = Held::create(&here.orchestrator).await?;
        held.ready(&here.orchestrator).await?;
        let pid = here.site.machines()?[0].pid.context("it runs")?;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGSTOP,
        )?;
        let ended = held.destroyed(&here.orchestrator).await?;
        assert_eq!(ended.phase, SessionPhase::Ended);
        here.nothing_is_left().await
    })
}

#[test]
fn a_domain_that_is_down_holds_up_its_own_desktops_and_no_others() -> Result<()> {
    alone(
        "a_domain_that_is_down_holds_up_its_own_desktops_and_no_others",
        async || {
            let realm = Realm::start()?;
            let site = Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, json!({}))?;
            let sections = format!(
                "domain = true\n[[template]]\nname = \"outside\"\nprovider = \"terraform\"\n{}{}",
                site.configuration()?,
                realm.configuration()
            );
            let mut here = Here::with(site, "proxmox domain down", "", sections).await?;
            let in_domain = CreateSession {
                user: Some("alice".to_owned()),
                ..CreateSession::default()
            };
            let member = Held::ask(&here.orchestrator, &in_domain).await?;
            until("its account is preset", READY, async || {
                Ok((!realm.accounts()?.is_empty()).then_some(()))
            })
            .await?;
            realm.cable(Cable::Pulled)?;
            here.orchestrator
                .client()
                .destroy(member.id, &member.secret)
                .await?;
            here.a_removal_fails(0).await?;

            let outside = CreateSession {
                template: Some("outside".to_owned()),
                ..CreateSession::default()
            };
            let other = Held::ask(&here.orchestrator, &outside).await?;
            other.ready(&here.orchestrator).await?;
            let ended = other.destroyed(&here.orchestrator).await?;
            assert_eq!(ended.phase, SessionPhase::Ended);
            let held = member.get(&here.orchestrator).await?;
            assert_eq!(held.phase, SessionPhase::Ending, "nothing is believed gone");

            realm.cable(Cable::Plugged)?;
            member
                .until(&here.orchestrator, "its end", READY, |s| s.phase.is_final())
                .await?;
            let accounts = realm.accounts()?;
            ensure!(accounts.is_empty(), "the domain has {accounts:?}");
            here.nothing_is_left().await
        },
    )
}

#[test]
fn a_domain_is_used_by_the_controller_that_answers_and_what_is_wrong_is_told() -> Result<()> {
    alone(
        "a_domain_is_used_by_the_controller_that_answers_and_what_is_wrong_is_told",
        async || {
            let realm = Realm::start()?;
            let right = Config::read(&realm.configuration(), "the test", [])?.domain;
            let name = DesktopName::from_number(1).context("a small number")?;
            let said = async |spoil: &dyn Fn(&mut DomainConfig)| {
                let mut config = right.clone();
                spoil(&mut config);
                domain::checks(&config).await.remove(0)
            };
            let check = said(&|_| {}).await;
            assert_eq!(check.status, CheckStatus::Ok, "{check:?}");
            let dead = |config: &mut DomainConfig| {
                config.servers.insert(0, "127.0.0.1:1".to_owned());
            };
            let check = said(&dead).await;
            assert_eq!(check.status, CheckStatus::Warning, "{check:?}");
            ensure!(check.detail.contains("127.0.0.1:1"), "{check:?}");

            let mut one_is_down = right.clone();
            dead(&mut one_is_down);
            let directory = one_is_down.open("1")?;
            let at = directory
                .preset(name, &"A-one-time-password".into())
                .await?;
            assert_eq!(at, right.servers[0]);
            assert_eq!(realm.accounts()?.len(), 1);
            ensure!(directory.exists(name).await?, "it is not seen");
            ensure!(directory.remove(name).await?, "it is not removed");
            ensure!(!directory.remove(name).await?, "it was there twice");
            assert_eq!(realm.accounts()?, Vec::<String>::new());

            for (words, spoil) in [
                (
                    "does not accept svc-mayfly@ad.mayfly.test or its password",
                    &(|config: &mut DomainConfig| {
                        config.password_file = config.password_file.with_file_name("alice");
                    }) as &dyn Fn(&mut DomainConfig),
                ),
                ("OU=Nowhere,DC=x does not exist", &|config| {
                    config.ou = "OU=Nowhere,DC=x".to_owned();
                }),
            ] {
                let check = said(spoil).await;
                assert_eq!(check.status, CheckStatus::Error, "{check:?}");
                ensure!(check.detail.contains(words), "{check:?}");
            }
            realm.cable(Cable::Pulled)?;
            let check = said(&|_| {}).await;
            assert_eq!(check.status, CheckStatus::Error, "{check:?}");
            ensure!(check.detail.contains("no answer from dc1."), "{check:?}");
            Ok(())
        },
    )
}

#[test]
fn another_installation_s_machines_are_left_alone() -> Result<()> {
    alone(
        "another_installation_s_machines_are_left_alone",
        async || {
            let mut here = Here::start("proxmox foreign", "", json!({})).await?;
            // Of our names and numbers, and without our mark: a second Mayfly with the same range, or a database that was lost.
            for number in 1..=2 {
                here.site.order(&json!({"do": [
                "add_vm", FIRST_VM_ID + number, format!("desktop-000000{number}"), "pve1", "stopped"
            ]}))?;
            }
            let held = Held::create(&here.orchestrator).await?;
            let ended = held.ended(&here.orchestrator).await?;
            assert_eq!(ended.phase, SessionPhase::Failed, "its number is taken");
            here.orchestrator.stop().await?;
            here.site.reaped(&here.lab, &mut here.orchestrator).await?;
            assert_eq!(here.site.machines()?.len(), 2);
            Ok(())
        },
    )
}

#[test]
fn two_providers_keep_their_own_through_a_restart_and_the_reaper() -> Result<()> {
    alone(
        "two_providers_keep_their_own_through_a_restart_and_the_reaper",
        async || {
            let site = Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, json!({}))?;
            let sections = format!(
                "[[template]]\nname = \"simulated\"\nprovider = \"simulated\"\n{}",
                site.configuration()?
            );
            let mut here = Here::with(site, "proxmox two providers", "", sections).await?;
            let simulated = CreateSession {
                template: Some("simulated".to_owned()),
                ..CreateSession::default()
            };
            let other = Held::ask(&here.orchestrator, &simulated).await?;
            let held = Held::create(&here.orchestrator).await?;
            other.ready(&here.orchestrator).await?;
            let name = held.ready(&here.orchestrator).await?.desktop;
            let name = name.context("a desktop")?;

            // One of each that nobody owns: when both are gone, the reaper has looked twice at both providers.
            let orphan = DesktopName::from_number(255).context("a small number")?;
            let file = here.lab.path(&format!("state/simulated/{orphan}.json"));
            std::fs::write(&file, "{}")?;
            let vm = |name| format!("vm {}", number(name));
            let marks = here.site.order(&json!({"get": [vm(name), "config"]}))?;
            here.site
                .order(&json!({"do": ["add_vm", number(orphan), orphan, "pve1", "stopped"]}))?;
            let marks = json!({"tags": marks["tags"]});
            here.site
                .order(&json!({"set": [vm(orphan), "config", marks]}))?;
            here.orchestrator.crash().await?;
            here.orchestrator.start_again(&here.lab).await?;
            until("what nobody owns is removed", END, async || {
                Ok((!file.exists() && here.site.machines()?.len() == 1).then_some(()))
            })
            .await?;
            here.orchestrator.stop().await?;
            here.orchestrator.start_again(&here.lab).await?;

            let callers = [
                other.call(&here.orchestrator).await?,
                held.call(&here.orchestrator).await?,
            ];
            other.destroyed(&here.orchestrator).await?;
            assert_eq!(here.site.machines()?[0].vmid, number(name));
            ensure!(
                held.get(&here.orchestrator).await?.phase.is_usable(),
                "it went with the other provider's"
            );
            drop(callers);
            held.destroyed(&here.orchestrator).await?;
            here.nothing_is_left().await
        },
    )
}

#[test]
fn the_documented_privileges_are_enough_and_doctor_names_each_that_is_missing() -> Result<()> {
    alone(
        "the_documented_privileges_are_enough_and_doctor_names_each_that_is_missing",
        async || {
            let wanted = Wanted {
                template: TEMPLATE.try_into()?,
                storage: "ceph".parse()?,
                pool: Some("daas".parse()?),
                network: "/sdn/zones/localnetwork/vmbr2".to_owned(),
                room: 0,
                rest: Rest::Nothing,
            };
            let mut needs = preflight::needs(&wanted, 9);
            needs.retain(|need| need.without == CheckStatus::Error);
            let documented = std::fs::read_to_string(site::module()?.join("../README.md"))?;
            let token = |id: &str, without: Option<usize>| {
                let held = needs
                    .iter()
                    .enumerate()
                    .filter(|(n, _)| Some(*n) != without);
                let acl: Vec<Value> = held
                    .map(|(_, need)| json!({"path": need.path, "privileges": [need.any_of[0]]}))
                    .collect();
                json!({"id": id, "secret": TOKEN.1, "acl": acl})
            };
            let lacking = |n: usize| format!("mayfly@pve!without-{n}");
            let mut tokens: Vec<Value> = (0..needs.len())
                .map(|n| token(&lacking(n), Some(n)))
                .collect();
            tokens.push(token(TOKEN.0, None));
            let mut here = Here::start("proxmox token", "", json!({"tokens": tokens})).await?;
            let configuration = here.site.configuration()?;
            let complaints = async |token: &str| -> Result<Vec<String>> {
                let text = configuration.replace(TOKEN.0, token);
                let config = Config::read(&text, "the test", [])?.provider.terraform;
                let mut found = terraform::checks(&config, Rest::Nothing).await;
                found.retain(|check| check.status == CheckStatus::Error);
                Ok(found.into_iter().map(|check| check.detail).collect())
            };
            for (n, need) in needs.iter().enumerate() {
                let privilege = need.any_of[0];
                let short = privilege.trim_start_matches("VM.Config.");
                ensure!(
                    documented.contains(&format!("`{privilege}`"))
                        || documented.contains(&format!("`{short}`")),
                    "terraform/README.md does not name {privilege}"
                );
                let said = complaints(&lacking(n)).await?;
                let words = format!("{} lacks {privilege} on {} (", lacking(n), need.path);
                ensure!(
                    said.iter().any(|s| s.starts_with(&words)),
                    "{words} {said:?}"
                );
            }
            assert_eq!(complaints(TOKEN.0).await?, Vec::<String>::new());
            let held = Held::create(&here.orchestrator).await?;
            held.ready(&here.orchestrator).await?;
            held.destroyed(&here.orchestrator).await?;
            here.nothing_is_left().await
        },
    )
}

#[test]
fn a_lock_that_is_held_too_long_reaches_nobody() -> Result<()> {
    alone("a_lock_that_is_held_too_long_reaches_nobody", async || {
        let mut here = Here::start("proxmox lock", "", json!({})).await?;
        // A backup, say: clones wait 10 s for the storage and fail.
        here.site
            .order(&json!({"do": ["hold_storage", "ceph", 14]}))?;
        let held = Held::create(&here.orchestrator).await?;
        let session = held.ready(&here.orchestrator).await?;
        let name = session.desktop.context("a desktop")?;
        ensure!(name.number() > 1, "nothing was in the way of {name}");
        let because = Setback::InTheWay;
        let told = here.told(&held).await?;
        let anew = StageProgress::MadeAnew { because };
        ensure!(told.contains(&anew), "{told:?}");
        held.destroyed(&here.orchestrator).await?;
        here.nothing_is_left().await
    })
}

#[test]
fn without_room_a_session_waits_in_the_queue() -> Result<()> {
    alone("without_room_a_session_waits_in_the_queue", async || {
        // Room for one desktop of 1536 MiB beside the node's own 1024.
        let nodes = json!({"nodes": [{"name": "pve1", "memory_mib": 3072, "cores": 2}]});
        let mut here = Here::start("proxmox full", "", nodes).await?;
        let first = Held::create(&here.orchestrator).await?;
        first.ready(&here.orchestrator).await?;
        let second = Held::create(&here.orchestrator).await?;
        second
            .reach(&here.orchestrator, StageName::Creating)
            .await?;
        second
            .until(&here.orchestrator, "it waits again", READY, |s| {
                s.phase == SessionPhase::Queued && s.queue_position == Some(1)
            })
            .await?;
        assert_eq!(here.site.machines()?.len(), 1);
        first.destroyed(&here.orchestrator).await?;
        second.ready(&here.orchestrator).await?;
        assert_eq!(here.told(&second).await?[0], StageProgress::NoRoom);
        second.destroyed(&here.orchestrator).await?;
        here.nothing_is_left().await
    })
}

#[test]
fn a_site_that_loses_its_power_at_any_moment_keeps_nothing_of_ours() -> Result<()> {
    alone(
        "a_site_that_loses_its_power_at_any_moment_keeps_nothing_of_ours",
        async || {
            let slow = json!({"keep_state": true, "delays": {"allocate": 2, "qmdestroy": 2}});
            let mut here = Here::start("proxmox power", "", slow).await?;
            for moment in ["cloned", "booted", "destroyed"] {
                let held = Held::create(&here.orchestrator).await?;
                if moment == "destroyed" {
                    held.ready(&here.orchestrator).await?;
                    let client = here.orchestrator.client();
                    client.destroy(held.id, &held.secret).await?;
                }
                until(moment, READY, async || {
                    let machines = here.site.machines()?;
                    Ok(match moment {
                        "cloned" => !machines.is_empty(),
                        "booted" => machines.iter().any(|m| m.running),
                        _ => machines.iter().all(|m| !m.running),
                    }
                    .then_some(()))
                })
                .await?;
                here.site.loses_power()?;
                if moment == "cloned" {
                    // Only root may: docs/proxmox.md tells the administrator.
                    for machine in here.site.machines()? {
                        here.site.order(&json!({"do": ["unlock", machine.vmid]}))?;
                    }
                }
                if moment != "destroyed" {
                    held.destroyed(&here.orchestrator).await?;
                }
                held.ended(&here.orchestrator).await?;
                here.nothing_is_left()
                    .await
                    .with_context(|| format!("it was {moment}"))?;
            }
            Ok(())
        },
    )
}

#[test]
fn what_a_site_lacks_is_told_in_words_and_leaves_nothing() -> Result<()> {
    alone(
        "what_a_site_lacks_is_told_in_words_and_leaves_nothing",
        async || {
            let mut here = Here::start("proxmox lacks", "", json!({})).await?;
            // The clone's task ends badly, and late.
            here.site.order(&json!({"do": [
                "fail_task", "qmclone", "clone failed: no space left in thin pool", 1
            ]}))?;
            for (words, order) in [
                ("thin pool", None),
                // The number is somebody else's: that machine is left alone.
                (
                    "first_vm_id",
                    Some(
                        json!({"do": ["add_vm", FIRST_VM_ID + 2, "mail-server", "pve1", "stopped"]}),
                    ),
                ),
            ] {
                if let Some(order) = order {
                    here.site.order(&order)?;
                }
                let held = Held::create(&here.orchestrator).await?;
                let ended = held.ended(&here.orchestrator).await?;
                let failure = ended.failure.context("a reason")?;
                ensure!(failure.problem.detail.contains(words), "{failure:?}");
            }
            let machines = here.site.machines()?;
            ensure!(
                machines
                    .iter()
                    .all(|m| m.name.as_deref() == Some("mail-server")),
                "{machines:?}"
            );
            here.lab.nothing_is_left()
        },
    )
}

#[test]
fn a_machine_without_an_address_is_made_anew_twice_and_then_told() -> Result<()> {
    alone(
        "a_machine_without_an_address_is_made_anew_twice_and_then_told",
        async || {
            let silent = json!({"delays": {"agent": 600}});
            let site = Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, silent)?;
            let sections = site.waiting(3)?;
            let mut here = Here::with(site, "proxmox no address", "", sections).await?;
            let held = Held::create(&here.orchestrator).await?;
            let ended = held
                .until(&here.orchestrator, "its end", READY, |s| s.phase.is_final())
                .await?;
            let failure = ended.failure.context("a reason")?;
            let words = failure.problem.detail;
            let third = DesktopName::from_number(3).context("a small number")?;
            ensure!(words.starts_with(&third.to_string()), "{words}");
            ensure!(words.contains("does vmbr2 have a DHCP server?"), "{words}");
            here.nothing_is_left().await
        },
    )
}

// ─── the conformance suite ───────────────────────────────────────────────────────────────────────────────────────────

/// A site with a store, a state backend and a place for agents to call; providers come and go.
struct Ground {
    site: Mutex<Site>,
    folder: tempfile::TempDir,
    store: Arc<SqliteStore>,
    secrets: Arc<Secrets>,
    agents: Arc<Agents>,
    config: Config,
    api: String,
    realm: Option<Realm>,
}

/// Who knows the conformance suite's token.
struct Suite;

#[async_trait]
impl Callers for Suite {
    async fn believe(&self, call: &Call) -> bool {
        use secrecy::ExposeSecret as _;
        call.token.expose_secret() == "a token for this test alone"
    }
}

impl Ground {
    async fn new(realm: Option<Realm>) -> Result<Self> {
        let site = Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, json!({}))?;
        let folder = tempfile::tempdir()?;
        let text = format!(
            "state_dir = {:?}\n[[template]]\nname = \"desktop\"\nprovider = \"terraform\"\n{}{}",
            folder.path(),
            site.configuration()?,
            realm.as_ref().map(Realm::configuration).unwrap_or_default(),
        );
        let config = Config::read(&text, "the test", [])?;
        let store = Arc::new(SqliteStore::open(&folder.path().join("mayfly.db")).await?);
        let secrets = Arc::new(Secrets::open(&folder.path().join("secret.key"))?);
        let listen = AgentsConfig {
            listen: Some(AGENTS.parse()?),
            ..AgentsConfig::default()
        };
        let agents = Agents::open(&listen, folder.path(), Arc::new(Suite)).await?;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let api = format!("http://{}", listener.local_addr()?);
        let backend = Backend {
            machines: store.clone(),
            secrets: secrets.clone(),
        };
        tokio::spawn(async move { axum::serve(listener, router(backend)).await });
        Ok(Self {
            site: Mutex::new(site),
            folder,
            store,
            secrets,
            agents,
            config,
            api,
            realm,
        })
    }
}

#[async_trait]
impl World for Ground {
    fn provider(&self, steps: Steps) -> Arc<dyn Provider> {
        let parts = Parts {
            orchestrator: program("mayfly-orchestrator").expect("it is built"),
            state: self.folder.path().to_owned(),
            machines: self.store.clone(),
            secrets: self.secrets.clone(),
            agents: self.agents.clone(),
            api: self.api.clone(),
            rest: Rest::Nothing,
        };
        let provider = Terraform::new(self.config.provider.terraform.clone(), parts);
        let provider = Arc::new(provider.expect("a site").with_steps(steps));
        if !self.in_domain() {
            return provider;
        }
        let mark = self.secrets.installation();
        let directory = Arc::new(self.config.domain.open(&mark).expect("a domain"));
        let secrets = self.secrets.clone();
        let member = Member::new(provider, directory, secrets, self.folder.path());
        Arc::new(member.expect("a folder for notes"))
    }

    fn in_domain(&self) -> bool {
        self.realm.is_some()
    }

    fn create_steps(&self) -> Vec<&'static str> {
        steps("create")
    }

    fn destroy_steps(&self) -> Vec<&'static str> {
        steps("destroy")
    }

    fn size(&self) -> (u32, u32) {
        (1, 256)
    }

    fn leftovers(&self) -> Vec<String> {
        let mut site = self.site.lock().expect("nobody panicked with it");
        let machines = site.machines().expect("the lab answers");
        let mut left: Vec<_> = machines.iter().map(|m| format!("{m:?}")).collect();
        if let Some(realm) = &self.realm {
            left.extend(realm.accounts().expect("the domain answers"));
        }
        let folders = ["terraform", "domain/terraform"].map(|f| self.folder.path().join(f));
        left.extend(
            folders
                .iter()
                .flat_map(std::fs::read_dir)
                .flatten()
                .flatten()
                .map(|entry| entry.path().display().to_string())
                .filter(|path| path.contains("desktop-")),
        );
        let reserved = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(self.store.reserved())
        });
        left.extend(
            reserved
                .expect("the store answers")
                .iter()
                .map(|r| format!("{r:?}")),
        );
        left
    }
}

fn steps(of: &str) -> Vec<&'static str> {
    STEPS.into_iter().filter(|s| s.starts_with(of)).collect()
}

#[test]
fn conformance_a_desktop_lives_and_dies() -> Result<()> {
    alone("conformance_a_desktop_lives_and_dies", async || {
        let ground = Ground::new(None).await?;
        let checks = ground.provider(Arc::new(|_| Ok(()))).preflight().await;
        ensure!(
            checks.iter().all(|check| check.status == CheckStatus::Ok),
            "the site is as the documentation wants it: {checks:?}"
        );
        conformance::a_desktop_lives_and_dies(&ground).await;
        Ok(())
    })
}

#[test]
fn conformance_a_crash_between_any_two_steps_leaves_nothing() -> Result<()> {
    alone(
        "conformance_a_crash_between_any_two_steps_leaves_nothing",
        async || {
            let ground = Ground::new(None).await?;
            conformance::nothing_is_destroyed_without_complaint(&ground).await;
            conformance::a_crash_between_any_two_steps_leaves_nothing(&ground).await;
            Ok(())
        },
    )
}

#[test]
fn conformance_accounts_of_a_domain_come_and_go_with_their_machines() -> Result<()> {
    alone(
        "conformance_accounts_of_a_domain_come_and_go_with_their_machines",
        async || {
            let ground = Ground::new(Some(Realm::start()?)).await?;
            conformance::nothing_is_destroyed_without_complaint(&ground).await;
            conformance::a_desktop_lives_and_dies(&ground).await;
            conformance::a_crash_between_any_two_steps_leaves_nothing(&ground).await;
            Ok(())
        },
    )
}

#[test]
fn conformance_many_at_once() -> Result<()> {
    alone("conformance_many_at_once", async || {
        conformance::many_at_once(&Ground::new(None).await?).await;
        Ok(())
    })
}

/// cloud-init may make host keys anew until its last word; the micro guest has none, so the lab says it in its place.
#[test]
fn a_host_key_is_read_from_inside_once_the_first_boot_is_over() -> Result<()> {
    alone(
        "a_host_key_is_read_from_inside_once_the_first_boot_is_over",
        async || {
            let ground = Ground::new(None).await?;
            let provider = World::provider(&ground, Arc::new(|_| Ok(())));
            let name = DesktopName::from_number(1).context("a number")?;
            let (cpus, memory_mib) = ground.size();
            provider
                .create(&DesktopSpec {
                    name,
                    session: SessionId::new(),
                    in_domain: false,
                    playbook: None,
                    cpus,
                    memory_mib,
                    lifetime: Duration::from_secs(600),
                })
                .await?;
            let inside = |line: &str| {
                let mut site = ground.site.lock().expect("nobody panicked with it");
                site.shell(number(name), line)
            };
            let key =
                "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ4Dw0mcCVwLsHhkTXUVbM9UyGcVcmJ5UYkM0CqWy6Hm";
            inside(&format!(
                "mkdir -p /etc/ssh && echo '{key} root@x' > /etc/ssh/ssh_host_ed25519_key.pub"
            ))?;
            match provider.ssh(name).await {
                Err(ProviderError::NotYet(why)) => {
                    ensure!(
                        why.contains("/var/lib/cloud/instance/boot-finished"),
                        "{why}"
                    );
                }
                other => anyhow::bail!("before the first boot is over: {other:?}"),
            }
            inside(
                "mkdir -p /var/lib/cloud/instance && : > /var/lib/cloud/instance/boot-finished",
            )?;
            let server = provider.ssh(name).await?;
            let address = provider.rdp_address(name).await?.ip();
            assert_eq!(server.address, SocketAddr::new(address, 22));
            assert_eq!(server.user, "mayfly");
            let shown = server.host_key.to_string();
            assert!(shown.starts_with(key), "{shown}");
            provider.destroy(name).await?;
            assert_eq!(ground.leftovers(), Vec::<String>::new());
            Ok(())
        },
    )
}

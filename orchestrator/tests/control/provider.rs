//! The simulated provider keeps the promises of every provider.

use crate::house::quick;
use async_trait::async_trait;
use mayfly_orchestrator::provider::conformance::{
    World, a_crash_between_any_two_steps_leaves_nothing, a_desktop_lives_and_dies,
    a_lifetime_ends_by_itself, many_at_once, nothing_is_destroyed_without_complaint,
};
use mayfly_orchestrator::provider::simulated::{STEPS, Simulated, SimulatedConfig};
use mayfly_orchestrator::provider::site::{self, Site};
use mayfly_orchestrator::provider::{Provider, Steps};
use std::sync::Arc;
use tokio::net::UnixListener;

struct Pretended {
    dir: tempfile::TempDir,
    config: SimulatedConfig,
    machines: Simulated,
}

impl Pretended {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = quick();
        let machines = Simulated::open(config.clone(), dir.path()).unwrap();
        Self {
            dir,
            config,
            machines,
        }
    }
}

fn steps(of: &str) -> Vec<&'static str> {
    STEPS.into_iter().filter(|s| s.starts_with(of)).collect()
}

#[async_trait]
impl World for Pretended {
    fn provider(&self, steps: Steps) -> Arc<dyn Provider> {
        Arc::new(self.machines.clone().with_steps(steps))
    }

    fn create_steps(&self) -> Vec<&'static str> {
        steps("create")
    }

    fn destroy_steps(&self) -> Vec<&'static str> {
        steps("destroy")
    }

    fn size(&self) -> (u32, u32) {
        (1, 128)
    }

    /// Files, and listening sockets on our addresses as the kernel lists them.
    fn leftovers(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.dir.path()).unwrap();
        let mut left: Vec<String> = files
            .map(|f| f.unwrap().file_name().into_string().unwrap())
            .collect();
        let second: u8 = self.config.address_prefix[4..].parse().unwrap();
        let (network, port) = (
            format!("{second:02X}7F:"),
            format!(":{:04X}", self.config.rdp_port),
        );
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        left.extend(sockets.lines().filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next()?, fields.nth(1)?);
            let ours = local.get(4..)?.starts_with(&network) && local.ends_with(&port);
            (ours && state == "0A").then(|| local.to_owned())
        }));
        left
    }
}

#[tokio::test]
async fn it_conforms() {
    let world = Pretended::new();
    a_desktop_lives_and_dies(&world).await;
    nothing_is_destroyed_without_complaint(&world).await;
    a_crash_between_any_two_steps_leaves_nothing(&world).await;
    many_at_once(&world).await;
    a_lifetime_ends_by_itself(&world).await;
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

/// The same, served as if to another process.
struct Served(Pretended, tempfile::TempDir);

#[async_trait]
impl World for Served {
    fn provider(&self, steps: Steps) -> Arc<dyn Provider> {
        let socket = self.1.path().join(uuid::Uuid::now_v7().to_string());
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(site::serve(self.0.provider(steps), listener));
        Arc::new(Site::at(socket))
    }

    fn create_steps(&self) -> Vec<&'static str> {
        self.0.create_steps()
    }

    fn destroy_steps(&self) -> Vec<&'static str> {
        self.0.destroy_steps()
    }

    fn size(&self) -> (u32, u32) {
        self.0.size()
    }

    fn leftovers(&self) -> Vec<String> {
        self.0.leftovers()
    }
}

#[tokio::test]
async fn machines_of_another_process_conform() {
    let world = Served(Pretended::new(), tempfile::tempdir().unwrap());
    a_desktop_lives_and_dies(&world).await;
    nothing_is_destroyed_without_complaint(&world).await;
    a_crash_between_any_two_steps_leaves_nothing(&world).await;
    many_at_once(&world).await;
    a_lifetime_ends_by_itself(&world).await;
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

//! The Ansible roles and playbooks, read by ansible-lint; the programs among them, tested.

use crate::house::House;
use crate::run;
use crate::tools;
use anyhow::{Context, Result};

/// Its rules change with its version.
const LINT: &str = "ansible-lint==26.10.1";
/// Where Debian's and Ubuntu's package `ansible` has the collections that the roles use.
const COLLECTIONS: &str = "/usr/lib/python3/dist-packages";

/// Fails on whatever the profile `production` finds.
pub(crate) fn lint(house: &House) -> Result<()> {
    let bin = tools::venv(house, LINT)?.join("bin");
    let old = std::env::var_os("PATH").unwrap_or_default();
    // It calls the ansible beside it.
    let path =
        std::env::join_paths(std::iter::once(bin.clone()).chain(std::env::split_paths(&old)))?;
    run::run(
        house
            .command(bin.join("ansible-lint"))
            .args(["--offline", "--profile", "production"])
            .current_dir(house.root.join("ansible"))
            .env("PATH", &path)
            .env("ANSIBLE_COLLECTIONS_PATH", COLLECTIONS),
    )
    .context("the Ansible roles")?;
    run::run(
        house
            .command(tools::venv(house, LINT)?.join("bin/python"))
            .args(["-m", "unittest", "discover", "--start-directory", "tests"])
            .current_dir(house.root.join("ansible"))
            .env("PATH", path)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("ANSIBLE_COLLECTIONS_PATH", COLLECTIONS),
    )
    .context("the inventory plugin and the program that joins")
}

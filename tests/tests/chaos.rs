//! Several orchestrators, and everything that can fail.

use anyhow::{Result, ensure};
use mayfly_tests::chaos;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_nothing_is_lost_and_nothing_is_left() -> Result<()> {
    let seed = fastrand::u64(..);
    println!("seed {seed}: cargo xtask chaos --seed {seed} draws the same");
    let report = chaos::run(seed, Duration::from_secs(120), None).await?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    ensure!(
        report.ok,
        "seed {seed}: {:?} {:?}",
        report.wrong,
        report.leftovers
    );
    Ok(())
}

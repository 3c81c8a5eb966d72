//! `nagaya doctor`.

use std::process::ExitCode;

use nagaya_runtime::doctor::{Weight, examine};

use crate::config::Config;

pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let findings = examine(&config.data_dir, &config.host.limits);
    let mut unusable = false;
    for finding in &findings {
        let (mark, text) = match (&finding.outcome, finding.weight) {
            (Ok(text), _) => ("ok", text),
            (Err(text), Weight::Required) => ("MISSING", text),
            (Err(text), Weight::Optional) => ("absent", text),
        };
        crate::say(format_args!("{mark:8} {:19} {text}", finding.name));
        if finding.outcome.is_err() && !finding.remedy.is_empty() {
            crate::say(format_args!("{:8} {:19} → {}", "", "", finding.remedy));
        }
        unusable |= finding.outcome.is_err() && finding.weight == Weight::Required;
    }
    crate::say("");
    if unusable {
        crate::say("driver namespace: cannot run here until what is MISSING is fixed");
        return Ok(ExitCode::FAILURE);
    }
    crate::say("driver namespace: ready");
    Ok(ExitCode::SUCCESS)
}

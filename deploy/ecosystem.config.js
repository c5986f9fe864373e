// Hivetrain under pm2:  pm2 start deploy/ecosystem.config.js --only hivetrain-miner
// Settings come from the TOML files named below; tokens (HF_TOKEN, WANDB_API_KEY) from the environment of pm2.
const path = require("path");

const root = path.resolve(__dirname, "..");

function neuron(role) {
  return {
    name: `hivetrain-${role}`,
    cwd: root,
    script: path.join(root, "neurons", `${role}.py`),
    interpreter: path.join(root, ".venv", "bin", "python"),
    args: ["--config", path.join(root, `${role}.toml`)],
    autorestart: true,
    exp_backoff_restart_delay: 1000, // milliseconds, doubled up to 15 s
    min_uptime: 60000,
    max_restarts: 10,
    stop_exit_codes: [2], // a setting that cannot work: starting again would not mend it
    kill_timeout: 30000,
    treekill: true, // the neuron's libp2p daemon is its child
    time: true,
  };
}

module.exports = { apps: [neuron("miner"), neuron("validator")] };

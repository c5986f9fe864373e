"""SwarmTrainer: any Hugging Face Trainer joins a swarm with one dict.

For people with no chain and no token. Peers find each other in hivemind's DHT and average gradients with
`hivemind.Optimizer`; everything around it, from what is refused before the first round to the last checkpoint, is here.

`from hivetrain import SwarmTrainer, SwarmArguments` loads transformers; `import hivetrain` does not.
"""

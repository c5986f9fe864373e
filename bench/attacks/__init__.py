"""The cheats, as code: what a miner could do instead of its work, what it would be paid, and by what it is found out.

cheat       the seam: everything that an honest miner does in a round, each step replaceable
training    cheats in the vector, the data, the steps, the base
sending     cheats in what is committed and in the all-reduce
answering   cheats in what a challenge is answered with
outside     attacks without any work: on the hub, the leader's place, the group
catalogue   all of them by name
world, rounds, pay      a tiny run in memory, facts about a cheat in it, and the lottery of challenges over them
checking, group         what both share: a challenge and its check, the all-reduce and publishing
miner, network         a cheating miner in the real network, and three epochs with each of them
loss, cost             what three cheats cost the model, and what checks cost a validator
"""

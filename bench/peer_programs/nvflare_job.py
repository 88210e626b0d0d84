"""An NVFlare job with its proof of concept's server and clients: FOLDER NUMBERS WORKERS ROUNDS.

Clients write when they get a round's numbers, to FOLDER/site-N.times.
"""

import sys
import time
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe.poc_env import PocEnv

CLIENT = """
import sys, time
import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    with open(f"{sys.argv[1]}/{flare.get_site_name()}.times", "a") as out:
        out.write(f"{time.time()}\\n")
    flare.send(flare.FLModel(params=model.params, params_type="FULL", metrics={"accuracy": 0.0}))
"""


def main() -> None:
    """Run the job to its end; the exit status says whether it was completed."""
    folder, numbers, workers, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    (folder / "client.py").write_text(CLIENT)
    np.save(folder / "start.npy", np.zeros(numbers, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="echo",
        initial_ckpt=str(folder / "start.npy"),
        min_clients=workers,
        # The first round's time holds the start, and the last one has none after it.
        num_rounds=rounds + 1,
        train_script=str(folder / "client.py"),
        train_args=str(folder),
    )
    environment = PocEnv(num_clients=workers)
    run = recipe.execute(environment)
    while not str(status := run.get_status()).startswith("FINISHED"):
        time.sleep(0.5)
    print("ended:", status)
    environment.stop(clean_up=True)
    sys.exit("COMPLETED" not in str(status))


if __name__ == "__main__":
    main()

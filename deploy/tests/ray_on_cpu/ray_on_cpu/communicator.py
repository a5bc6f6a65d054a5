from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Communicator(CpuCommunicator):
    """Ranks that talk over the network.

    vLLM's look for each other in shared memory if the port of their meeting is the same, which
    with Ray it is on all hosts: "open shm in SHMManager failed. errno: 2".
    """

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False

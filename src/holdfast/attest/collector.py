"""temporary"""
from holdfast.errors import HostError
class Collector:
    def __init__(self, keeper): self.keeper=keeper
    async def collect(self, vtpm, nonce, audience, user_data): raise HostError("not yet")

"""The contract suite, for our mechanisms and for yours.

from attention_zoo.testing import contract_checks
for check in contract_checks(MyAttention):      # or the name of a registered backend
    check()                                     # AssertionError says what is wrong
"""

from attention_zoo.testing.case import Case, Reference
from attention_zoo.testing.suite import ContractCheck, contract_checks

__all__ = ["Case", "ContractCheck", "Reference", "contract_checks"]

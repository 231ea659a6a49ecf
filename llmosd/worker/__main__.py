import sys

from llmosd.worker.host import main

sys.exit(main())

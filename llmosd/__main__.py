from llmosd.main import main

main()

from fusewire.cli import main

main()

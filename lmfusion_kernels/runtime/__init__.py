"""What is compiled and installed, which backend runs, and checks that all ops share."""

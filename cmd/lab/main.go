// SPDX-License-Identifier: Apache-2.0

// Command lab keeps disposable virtual machines that a Labfile declares.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/labfile/lab/internal/cli"
)

func main() { os.Exit(run()) }

// run carries out the command line. The first signal asks the command to end in
// good order, the second does not ask.
func run() int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab: error: finding this program: %v\n", err)
		return cli.ExitFailed
	}
	w := &wiring{self: self, getenv: os.Getenv}
	done := make(chan int, 1)
	go func() {
		done <- cli.Run(ctx, cli.Config{
			In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv, Dir: os.Getwd,
			Program: self, Version: buildVersion,
			Host: w.host, Boxes: w.boxes, Supervise: w.supervise,
		}, os.Args[1:])
	}()
	for asked := false; ; asked = true {
		select {
		case code := <-done:
			return code
		case <-signals:
			if asked {
				return cli.ExitInterrupted
			}
			cancel()
		}
	}
}

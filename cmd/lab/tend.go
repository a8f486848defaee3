// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/labfile/lab/internal/lab"
)

// tend does what is due in a process of its own: it may end this one, and must
// outlive it.
func (w *wiring) tend(ctx context.Context, id lab.ID) error {
	cmd := exec.Command(w.self, "tend", string(id))
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr // the supervisor's log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting lab tend: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

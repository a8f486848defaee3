// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
)

// supervise is the main loop of a lab's supervisor. The ledger says which
// provider runs the lab; the ends of machines are recorded there.
func (w *wiring) supervise(ctx context.Context, id lab.ID, log *slog.Logger) error {
	d, err := dirs.FromEnv(w.getenv)
	if err != nil {
		return fmt.Errorf("finding lab's directories: %w", err)
	}
	book := ledger.Open(d.Ledger(id))
	records, err := book.Read()
	if err != nil {
		return err
	}
	state, err := ledger.Fold(records)
	if err != nil {
		return err
	}
	host, err := w.host(log)
	if err != nil {
		return err
	}
	p, err := host.Provider(state.Opened)
	if err != nil {
		return err
	}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	go host.Lab(id).Watch(watching, func(ctx context.Context) error { return w.tend(ctx, id) })
	return supervise.Run(ctx, supervise.Config{
		ID: id, Dirs: d, Provider: p, Version: buildVersion().Version, Log: log,
		Ready: supervise.Ready(w.getenv), Folder: host.Lab(id).Folder,
		Record: func(e supervise.Event) error {
			if e.Kind != supervise.EventExited {
				log.Info("machine", "event", e.Kind, "generation", e.Generation.String(), "detail", e.Detail)
				return nil
			}
			_, err := book.AppendIfExists(ledger.Record{
				Type: ledger.MachineExited, Machine: e.Generation.Machine, Generation: e.Generation.Number,
			}, ledger.Exited{Reason: string(e.Exit.Reason), Detail: e.Exit.Detail})
			if errors.Is(err, fs.ErrNotExist) { // the lab was destroyed by a command that could not reach this process
				return nil
			}
			return err
		},
	})
}

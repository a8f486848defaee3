// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/build"
	"github.com/labfile/lab/boxes/recipes"
	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/cli"
	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/libvirt"
	"github.com/labfile/lab/providers/memory"
	"github.com/labfile/lab/providers/qemu"
)

// wiring makes what commands need, when they need it.
type wiring struct {
	self   string // absolute path of this program
	getenv func(string) string
}

// host opens the labs of this user.
func (w *wiring) host(log *slog.Logger) (*engine.Host, error) {
	d, err := dirs.FromEnv(w.getenv)
	if err != nil {
		return nil, fmt.Errorf("finding lab's directories: %w", err)
	}
	return &engine.Host{
		Dirs: d, Log: log, Boxes: &lateBoxes{w: w, log: log},
		Providers: w.providers(d, log),
		Agent:     build.Agent, Getenv: w.getenv,
		Spawn: func(id lab.ID) error {
			return supervise.Spawn(w.self, []string{"supervise", string(id)}, d.SupervisorLog(id))
		},
	}, nil
}

func (w *wiring) providers(d dirs.Dirs, log *slog.Logger) map[string]providers.Provider {
	q := qemu.New(qemu.Config{Dirs: d, Accel: w.getenv(accel.Variable), Log: log})
	v := libvirt.New(libvirt.Config{
		Dirs: d, URI: w.getenv(libvirt.URIVariable), Accel: w.getenv(accel.Variable), Getenv: w.getenv, Log: log,
	})
	m := memory.New(memory.Config{})
	return map[string]providers.Provider{q.Name(): q, v.Name(): v, m.Name(): m}
}

// boxes opens the box store and what fills it.
func (w *wiring) boxes(log *slog.Logger) (cli.Boxes, error) {
	d, err := dirs.FromEnv(w.getenv)
	if err != nil {
		return cli.Boxes{}, fmt.Errorf("finding lab's directories: %w", err)
	}
	store, err := boxes.Open(d.Boxes())
	if err != nil {
		return cli.Boxes{}, err
	}
	b := &builder{
		store: store,
		tool: &build.Builder{
			Mirror: w.getenv(build.MirrorEnv),
			Log:    func(line string) { log.Debug("build", "line", line) },
		},
		dir: d.Downloads(),
	}
	return cli.Boxes{
		Store: store, Builtin: recipes.Names(),
		Resolver: &source.Resolver{Store: store, Builder: b, Cache: d.Downloads()},
		Build: func(ctx context.Context, name string, p func(string, int64, int64)) (boxes.Box, error) {
			return b.Build(ctx, name, p)
		},
	}, nil
}

// lateBoxes opens the store when the first box is looked for: most commands look
// for none.
type lateBoxes struct {
	w   *wiring
	log *slog.Logger
}

// Resolve implements engine.Boxes.
func (l *lateBoxes) Resolve(ctx context.Context, r source.Request) (source.Result, error) {
	b, err := l.w.boxes(l.log)
	if err != nil {
		return source.Result{}, err
	}
	return b.Resolver.Resolve(ctx, r)
}

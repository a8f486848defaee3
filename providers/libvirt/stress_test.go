// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/libvirt/daemontest"
	"github.com/labfile/lab/providers/providertest"
)

// Machines share the files of their image: one that starts must be able to read them
// while another one stops, whatever libvirt does with their owner. The daemons of these
// tests change owners and do not remember them.
func TestSharedFiles(t *testing.T) {
	t.Run("system", func(t *testing.T) {
		t.Parallel()
		d := daemontest.StartSystem(t)
		dirs := testDirs(t)
		stress(t, 1, testProvider(t, d, dirs))
	})
	t.Run("remote", func(t *testing.T) {
		t.Parallel()
		d := daemontest.StartFar(t)
		stress(t, 2, testRemote(t, "qemu+tls://"+d.TLS+"/system?pkipath="+d.PKI, d.Daemon, testDirs(t)))
	})
}

// stress starts and stops twenty machines of one image in an order that the seed gives,
// some at the same time.
func stress(t *testing.T, seed uint64, p providers.Provider) {
	const machines, changes, workers = 20, 40, 4
	ctx := t.Context()
	image := providertest.BootImage(t, false)
	image.Kernel = filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(image.Kernel, make([]byte, 4096), 0o400); err != nil {
		t.Fatal(err)
	}
	var all []lab.Generation
	for i := range machines {
		g := lab.Generation{Lab: webOne.Lab, Machine: lab.Name(fmt.Sprintf("m%d", i)), Number: 1}
		all = append(all, g)
		if err := p.Create(ctx, providers.Spec{Generation: g, Image: image, CPUs: 1, Memory: 16 * lab.MiB}); err != nil {
			t.Fatal(err)
		}
	}
	random := rand.New(rand.NewPCG(seed, 0))
	order := make(chan int, changes)
	for range changes {
		order <- random.IntN(machines)
	}
	close(order)
	var busy [machines]struct {
		sync.Mutex
		runs bool
	}
	var wait sync.WaitGroup
	for range workers {
		wait.Go(func() {
			for i := range order {
				m := &busy[i]
				m.Lock()
				var err error
				if m.runs {
					err = p.Stop(ctx, all[i], 0)
				} else {
					err = p.Start(ctx, all[i])
				}
				if err != nil {
					t.Error(err)
				}
				m.runs = err == nil && !m.runs
				m.Unlock()
			}
		})
	}
	wait.Wait()
	cleanup := context.WithoutCancel(ctx)
	var errs []error
	for _, g := range all {
		errs = append(errs, p.Destroy(cleanup, g))
	}
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

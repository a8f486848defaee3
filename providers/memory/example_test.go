// SPDX-License-Identifier: Apache-2.0

package memory_test

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// A machine is a goroutine. This one prints a line and waits for its power button.
func Example() {
	host := memory.New(memory.Config{Program: func(providers.Spec) memory.Program {
		return func(ctx context.Context, g *memory.Guest) error {
			fmt.Fprintf(g, "%s is up\n", g.Spec.Machine)
			select {
			case <-g.PowerButton():
			case <-ctx.Done():
			}
			return nil
		}
	}})
	ctx := context.Background()
	web := lab.Generation{Lab: "shop-1f3a9c2b", Machine: "web", Number: 1}
	image := providers.Image{Digest: "sha256:" + strings.Repeat("0", 64), Arch: "amd64", Size: lab.MiB}
	must(host.Create(ctx, providers.Spec{Generation: web, Image: image, CPUs: 1, Memory: 64 * lab.MiB}))
	must(host.Start(ctx, web))
	must(host.Stop(ctx, web, time.Minute))
	exit, err := host.Wait(ctx, web)
	must(err)
	log, err := host.OpenLog(ctx, web, providers.LogConsole)
	must(err)
	text, err := io.ReadAll(log)
	must(err)
	fmt.Printf("%s ended by: %s\n%s", web, exit.Reason, text)
	must(host.Destroy(ctx, web))
	// Output:
	// web@1 ended by: host
	// web is up
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

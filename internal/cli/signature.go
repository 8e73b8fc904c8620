package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"drafter/packager"
	"drafter/signature"
)

// verifyFlags say which packages are accepted.
type verifyFlags struct {
	keys []string
	file string
}

func (v *verifyFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&v.keys, "verify-key", nil, "File with public keys in PEM, Ed25519 or ECDSA on P-256: only a package that one of them has signed is accepted (repeatable)")
	f.StringVar(&v.file, "signature", "", "File with the package's signature (leave empty for the one that the package has)")
}

// resolve returns nil if all packages are accepted.
func (v *verifyFlags) resolve() (*signature.Verifier, error) {
	switch {
	case len(v.keys) > 0:
		verifier, err := signature.NewVerifier(v.keys, v.file)
		if err != nil {
			return nil, &usageError{fmt.Errorf("--verify-key: %w", err)}
		}
		return verifier, nil
	case v.file != "":
		return nil, &usageError{errors.New("--signature needs --verify-key: a signature says nothing without the key that it shall be by")}
	}
	return nil, nil
}

func newSign() *cobra.Command {
	var pkg, key, output string
	cmd := &cobra.Command{
		Use:   "sign",
		Short: "Sign a VM package",
		Long: `Signs what the devices of a package contain. With --verify-key of 'drafter
pull', 'drafter packager --extract', 'drafter runner' and 'drafter peer', others verify that they
run what was signed. The signature, package.sig beside the package's config device, goes with the
package into archives and registries.

A run without an instance changes the package, which then has to be signed again. The signature of
an older version of a package stays valid.

Keys are Ed25519 or ECDSA on P-256, in PEM, as openssl makes them. See docs/signing.md.
` + exitCodeHelp,
		Example: `  openssl genpkey -algorithm ed25519 -out key.pem
  openssl pkey -in key.pem -pubout -out key.pub
  drafter sign --key key.pem --package out/package
  drafter peer --raddr '' --laddr '' --verify-key key.pub --package out/package --instance out/instance-0`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if key == "" {
				return &usageError{errors.New("--key is missing; 'openssl genpkey -algorithm ed25519 -out key.pem' makes one")}
			}
			k, err := signature.ReadPrivateKey(key)
			if err != nil {
				return err
			}
			if err := packager.Sign(cmd.Context(), pkg, k, output); err != nil {
				return err
			}
			if output == "" {
				output = filepath.Join(pkg, signature.File)
			}
			slog.Info("Signed package", "package", pkg, "signature", output)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&key, "key", "", "File with the private key in PEM (PKCS #8, not encrypted)")
	f.StringVar(&pkg, "package", "out/package", "Directory of the package")
	f.StringVar(&output, "signature", "", "File to write the signature to (leave empty for package.sig in the directory of the package)")
	return cmd
}

func newVerify() *cobra.Command {
	var verify verifyFlags
	var size sizeFlag
	var pkg string
	var plainHTTP bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check the signature of a VM package",
		Long: `Checks that one of the keys has signed a package. Of a directory, everything
is read. Of docker://REF in an OCI registry, the lists of content ids are read, by which every block
is verified when it is pulled. 'drafter packager --extract --verify-key' checks an archive.

A package may change between this check and its use. With the same flags, the commands that use a
package verify it themselves.
` + exitCodeHelp,
		Example: `  drafter verify --verify-key key.pub --package out/package`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, start := cmd.Context(), time.Now()
			verifier, err := verify.resolve()
			if err != nil {
				return err
			}
			if verifier == nil {
				return &usageError{errors.New("--verify-key is missing")}
			}
			if strings.HasPrefix(pkg, registryScheme) {
				maxSize, err := size.resolve()
				if err != nil {
					return err
				}
				digest, err := packager.Artifact{Reference: pkg, PlainHTTP: plainHTTP, MaxSize: maxSize}.Verify(ctx, verifier)
				if err != nil {
					return err
				}
				slog.Info("The signature fits", "package", pkg, "digest", digest)
				return nil
			}
			if err := packager.Verify(ctx, pkg, verifier); err != nil {
				return err
			}
			slog.Info("The signature fits", "package", pkg, "took", time.Since(start).Round(time.Millisecond))
			return nil
		},
	}
	verify.add(cmd)
	size.add(cmd)
	f := cmd.Flags()
	f.StringVar(&pkg, "package", "out/package", "Directory of the package, or docker://REF")
	f.BoolVar(&plainHTTP, "plain-http", false, "Talk to the registry without TLS; registries on loopback addresses need no flag")
	return cmd
}

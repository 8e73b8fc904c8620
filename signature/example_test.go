package signature_test

import (
	"errors"
	"log"

	"drafter/signature"
)

// A verifier tells whether a package has a signature of one of its keys. Components take it in
// their configs.
func Example() {
	verifier, err := signature.NewVerifier([]string{"key.pub"}, "")
	if err != nil {
		log.Fatal(err)
	}
	statement, err := verifier.Statement(nil, "out/package/config.json")
	if errors.Is(err, signature.ErrUnsigned) {
		log.Fatal("it has none")
	}
	log.Print("it was signed for the devices ", statement.Names(), err)
}

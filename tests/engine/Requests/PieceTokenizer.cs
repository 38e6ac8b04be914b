namespace Rollout.Engine.Tests;

/// <summary>A tokenizer that is a list: token t stands for the bytes pieces[t].</summary>
internal sealed class PieceTokenizer(byte[][] pieces) : Tokenizer
{
    public override int VocabSize => pieces.Length;

    public override IReadOnlyDictionary<string, int> SpecialTokens => new Dictionary<string, int>();

    public override int[] Encode(string text, bool addSpecialTokens) => throw new NotSupportedException();

    public override ReadOnlySpan<byte> TokenBytes(int id) => pieces[id];
}

namespace Rollout.Engine;

public abstract class Tokenizer
{
    public abstract int[] Encode(string text, bool addSpecialTokens);

    public abstract string Decode(ReadOnlySpan<int> ids);

    public abstract ReadOnlySpan<byte> TokenBytes(int id);
}

using System.Buffers.Binary;
using Rollout.Engine;

namespace Rollout.Server.Generation;

/// <summary>
/// What every surface needs to convert its requests to the engine's: tokenized text, and ids and seeds where the client gives none.
/// Problems are collected, not thrown, under the field names of the surface.
/// </summary>
internal abstract class RequestReader(Tokenizer? tokenizer)
{
    // Replaces a prompt that is reported as a problem, so that the engine does not report it again.
    private static readonly int[] s_anyPrompt = [0, 0];

    private readonly ProblemList _problems = [];

    public ProblemList Problems => _problems;

    protected static string IdOrNew(string id) => id.Length > 0 ? id : $"server-{Guid.CreateVersion7():N}";

    protected static ulong RandomSeed()
    {
        Span<byte> bytes = stackalloc byte[8];
        Random.Shared.NextBytes(bytes);
        return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
    }

    protected void Report(string field, string message) => _problems.Add(new Problem(field, message));

    protected int[] Encode(string text, string field)
        => NeedTokenizer(field) ? tokenizer!.Encode(text, addSpecialTokens: true) : s_anyPrompt;

    protected int[] Missing(string field, string message)
    {
        Report(field, message);
        return s_anyPrompt;
    }

    protected bool NeedTokenizer(string field)
    {
        if (tokenizer is not null) return true;
        Report(field, "the model has no tokenizer; send token ids");
        return false;
    }
}

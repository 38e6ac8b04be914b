using Rollout.Engine;
using Rollout.V1;

namespace Rollout.Server.Commands;

/// <summary>Where a command's tokens come from: an engine in this process, or a server.</summary>
internal interface IRollouts : IAsyncDisposable
{
    /// <summary>Turns ids into text for people; null where that is not possible.</summary>
    Tokenizer? Tokenizer { get; }

    IAsyncEnumerable<GenerateReply> GenerateAsync(GenerateRequest request, CancellationToken cancellation);

    Task<ScoreReply> ScoreAsync(ScoreRequest request, CancellationToken cancellation);
}

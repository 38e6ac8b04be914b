namespace Rollout.Client;

/// <param name="Groups">Ended by this call.</param>
/// <param name="Samples">Ended by this call.</param>
/// <param name="Unknown">Ids that are not in flight.</param>
public sealed record AbortResult(int Groups, int Samples, IReadOnlyList<string> Unknown);

/// <param name="State">Of the engine, now that the pause is in force.</param>
/// <param name="AbortedSamples">With <see cref="PauseMode.Abort"/>, else 0.</param>
public sealed record PauseResult(EngineState State, int AbortedSamples);

/// <summary>Log-probabilities of given tokens.</summary>
/// <param name="Ids">The tokens scored.</param>
/// <param name="LogProbs">Model log-probability of <c>Ids[1..]</c>, each given the tokens before it: one less than ids.</param>
/// <param name="Top">
/// Alternatives of every position after the first and, in the last row, of the token that would come next: one row an id. Null unless
/// asked for.
/// </param>
/// <param name="Version">Of the weights that scored.</param>
public sealed record ScoreResult(int[] Ids, float[] LogProbs, TopLogProbs? Top, ulong Version);

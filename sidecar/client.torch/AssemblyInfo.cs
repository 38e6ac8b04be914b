using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Rollout.Client.Tests")]
